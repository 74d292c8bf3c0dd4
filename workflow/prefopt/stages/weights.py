"""Weights of parents: where they are, the models and tokenizers read from them, what a job trained on top of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.artifacts import outputs_digest
from prefopt.errors import BadInput
from prefopt.files import read_json, write_json
from prefopt.processes import parallel
from prefopt.stages.common import device_of
from prefopt.store.builds import Build

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.engine.answers import Mixture
    from prefopt.engine.precision import Precision
    from prefopt.stages import RunOptions

WEIGHTS = "weights"
TOKENIZER = "tokenizer"
SOURCE = "source.json"
BASE = "base.json"  # beside an adapter: the parent whose weights it stands on
MIXTURE = "mixture.json"  # of policies that take turns, in place of weights


class Weights(NamedTuple):
    """A model folder, whether its own code may run, and the adapters to merge into its weights, in order."""

    folder: Path
    trusted: bool
    adapters: tuple[Path, ...] = ()

    def loading(self) -> dict[str, Any]:
        """What the loaders of ``models`` take beside the folder."""
        return {"adapters": self.adapters, "trust_remote_code": self.trusted}


def weights_of(artifact: Path) -> Weights:
    """Where the weights of an artifact are.

    The artifact holds them, or an adapter and the name of what it stands on, or (base models from outside) says where
    they are. Raises BadInput where that is gone, or not what the adapter was trained on.
    """
    if (artifact / WEIGHTS / BASE).is_file():
        base = read_json(artifact / WEIGHTS / BASE)
        below = artifact.parents[1] / base["base"]
        if outputs_digest(below) != base["outputs"]:
            raise BadInput(f"{below}: was made again, with another result, after the adapter of {artifact} was trained")
        found = weights_of(below)
        return found._replace(adapters=(*found.adapters, artifact / WEIGHTS))
    if (artifact / WEIGHTS).is_dir():
        return Weights(artifact / WEIGHTS, trusted=False)
    source = read_json(artifact / SOURCE)
    if "path" in source:
        folder = Path(source["path"])
        if not folder.is_dir():
            raise BadInput(f"{folder}: the model folder recorded in {artifact / SOURCE} is gone")
        return Weights(folder, source["trust_remote_code"])
    from prefopt.inputs.hub import model_snapshot

    folder = model_snapshot(source["repo"], source["revision"], code=source["trust_remote_code"])
    return Weights(folder, source["trust_remote_code"])


def policy_of(
    build: Build,
    options: RunOptions,
    precision: Precision = "fp32",
    quantize: str | None = None,
    role: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of the parent in that role, and its tokenizer as ``tokenizer_for`` checks it."""
    from prefopt.models import load_causal_lm

    weights = weights_of(build.parent(role))
    device = device_of(build, options)
    settings = {"precision": precision, "quantize": quantize, **weights.loading()}
    model = load_causal_lm(weights.folder, device=device, **settings)
    return model, tokenizer_for(build, weights.folder, weights.trusted)


def answerer_of(
    build: Build, options: RunOptions, role: str = "model"
) -> tuple[PreTrainedModel | Mixture, PreTrainedTokenizerBase]:
    """What answers prompts for the parent in that role, and its tokenizer: a policy as ``policy_of``, or a mixture.

    Raises BadInput where a policy of the mixture is no longer what was mixed.
    """
    folder = build.parent(role)
    if not (folder / MIXTURE).is_file():
        return policy_of(build, options, role=role)
    return _mixture(build, options, folder)


def _mixture(build: Build, options: RunOptions, folder: Path) -> tuple[Mixture, PreTrainedTokenizerBase]:
    from prefopt.engine.answers import Mixture
    from prefopt.models import load_causal_lm

    models, shares = [], []
    for part in read_json(folder / MIXTURE)["policies"]:
        if part["weight"] == 0:
            continue
        below = build.results / part["policy"]
        if outputs_digest(below) != part["outputs"]:
            raise BadInput(f"{below}: was made again, with another result, after {folder} was mixed")
        weights = weights_of(below)
        models.append(load_causal_lm(weights.folder, device=device_of(build, options), **weights.loading()))
        shares.append(part["weight"])
    return Mixture(tuple(models), tuple(shares)), tokenizer_for(build, weights.folder, weights.trusted)


def tokenizer_for(build: Build, folder: Path, trusted: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; BadInput where its vocabulary is not the one of every parent's token ids."""
    from prefopt.inputs.tokenizer_training import check_same_vocabulary
    from prefopt.models import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    for artifact in {ref: build.parent(role) for role, ref in build.node.parents.items() if _is_tokens(role)}.values():
        check_same_vocabulary(tokenizer, load_tokenizer(artifact / TOKENIZER))
    return tokenizer


def _is_tokens(role: str) -> bool:
    return role.rsplit(".", maxsplit=1)[-1] == "tokens"


def with_adapter(build: Build, model: PreTrainedModel, seed: int, head: nn.Module | None = None) -> None:
    """Put the adapter that the spec's ``train`` section declares, if any, onto the model, with the head it trains."""
    from prefopt.engine.adapters import add_adapter
    from prefopt.specs import AdapterSpec

    declared = build.node.spec["train"].get("adapter")
    if declared is not None:
        add_adapter(model, AdapterSpec.model_validate(declared), seed=seed, head=head)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        build.summary |= {"trained_parameters": trained, "parameters": sum(p.numel() for p in model.parameters())}


def save_trained(build: Build, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parent: str) -> None:
    """Write what was trained, by one process: a model folder, or the adapter and what its weights stand on."""
    if not parallel.is_main():
        return
    from prefopt.engine.adapters import is_adapted, save_adapter
    from prefopt.models import save_model

    folder = build.work / WEIGHTS
    if not is_adapted(model):
        save_model(model, tokenizer, folder)
        return
    save_adapter(model, folder)
    base = {"base": build.node.parents[parent], "outputs": outputs_digest(build.parent(parent))}
    write_json(folder / BASE, base)

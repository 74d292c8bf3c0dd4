"""What the rounds of one arm and seed have in common: the arm, its data, and the artifacts that a round is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.planning.wiring import Wiring, resolve_arm

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.specs import ArmSpec, EnsembleSpec, ResponsesSpec, TrainSpec

_ROUND_SEEDS = 1_000  # between the sampling seeds of two training seeds: more than there are rounds


@dataclass(frozen=True)
class Chain:
    """One arm with one seed. ``home`` is the wiring over the arm's own data; rounds add wirings over data of theirs."""

    home: Wiring
    arm_name: str
    arm: ArmSpec
    train: TrainSpec
    seed: int

    @classmethod
    def of(cls, home: Wiring, arm_name: str, arm: ArmSpec, train: TrainSpec, seed: int) -> Chain:
        """The chain of an arm; BadInput where its body is quantised, since every round starts from whole weights."""
        if home.quantize is not None or train.quantize is not None:
            raise BadInput(
                f"arms.{arm_name}.rounds: a round starts from the weights of the one before, which are whole; remove "
                "'adapter.quantize'"
            )
        return cls(home, arm_name, arm, train, seed)

    @property
    def why(self) -> str:
        """How messages call the declaration."""
        return f"arms.{self.arm_name}.rounds"

    def fitted(self, over: Wiring, start: Node, reference: Node | None = None, **more: Any) -> Node:
        """The policy that the arm's loss makes of ``start`` on the pairs of ``over``.

        ``start`` is its reference, unless one is given. ``more`` goes into the spec.
        """
        loss, params, regulariser, needs = resolve_arm(self.arm)
        spec = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": self.train.model_dump(),
            "seed": self.seed,
            **({"continues": True} if reference not in (None, start) else {}),
            **more,
        }
        signals = replace(over, start=start, compared=reference).signals(self.arm_name, self.arm, needs)
        return over.plan.add("policy", f"{loss}-s{self.seed}", spec, signals)

    def ensemble(self, field: str, name: str) -> EnsembleSpec:
        """One of the item's reward ensembles; BadInput names the field where there is none of that name."""
        named = self.arm.model_copy(update={"rewards": name})
        try:
            return self.home.rewards[self.home.ensembles.named_by(self.arm_name, named)]
        except BadInput as error:
            raise BadInput(str(error).replace(f"arms.{self.arm_name}.rewards", f"{self.why}.{field}")) from None

    def drawn(self, model: Node, per_prompt: int, number: int, prompts: int | None) -> Node:
        """Responses of a round's model to so many train prompts, with a sampling seed of the round's own."""
        sampling = self.home.samples
        if sampling is None:
            raise BadInput(f"{self.why}: rounds draw responses; declare 'samples' in the item")
        seed = sampling.seed + _ROUND_SEEDS * (self.seed + 1) + number
        spec = {
            "sampling": sampling.model_copy(update={"seed": seed}).model_dump(),
            "split": "train",
            "per_prompt": per_prompt,
            **({"prompts": prompts} if prompts is not None else {}),
        }
        return self.home.plan.add("samples", f"{model.name}-r{number}", spec, self.asking(model))

    def asking(self, model: Node) -> dict[str, Node]:
        """The arm's own prompts, and a model to answer them."""
        return {"tokens": self.home.tokens, "model": model}

    def answered(self, declared: ResponsesSpec, model: Node, number: int) -> Wiring:
        """The wiring over pairs that a round makes of its model's responses, labelled as declared."""
        samples = self.drawn(model, declared.per_prompt, number, declared.prompts)
        judges = self.judges(self.ensemble("responses.labels", declared.labels))
        return self.labelled(samples, judges, number, choose=declared.choose, prompts=None)

    def judges(self, ensemble: EnsembleSpec) -> list[Node]:
        """The models of an ensemble, trained on the arm's own data; none stands for the oracle."""
        if ensemble.kind == "general_preference":
            return [self.home.ensembles.one_model(ensemble)]
        return [] if ensemble.oracle else self.home.ensembles.members(ensemble)

    def labelled(
        self, samples: Node, judges: list[Node], number: int, *, onto: Wiring | None = None, **spec: Any
    ) -> Wiring:
        """The wiring over the pairs that ``judges``, or the oracle, choose from samples of the arm's own prompts.

        ``onto``: they are added to its pairs, instead of taking the place of the arm's own train pairs. Reward models
        that a loss needs stay those of the arm's own data.
        """
        home = self.home
        spec |= {"oracle": not judges, "seed": _ROUND_SEEDS * self.seed + number}
        spec |= {"keep": True} if onto else {}
        if judges and judges[0].spec.get("kind"):
            spec |= {"kind": judges[0].spec["kind"], "outputs": judges[0].spec["dimension"]}
        parents = {"pairs": (onto or home).pairs, "tokens": home.tokens, "samples": samples}
        parents |= {f"reward{k}": member for k, member in enumerate(judges)}
        pairs = home.plan.add("sampled_pairs", samples.name, spec, parents)
        base = home.plan.node(home.tokens.parents["base"])
        tokens = home.plan.add("tokens", pairs.name, home.tokens.spec, {"pairs": pairs, "base": base})
        return replace(
            home,
            pairs=pairs,
            tokens=tokens,
            trained_on=home.trained_on or home.tokens,
            given={} if onto else {"advantages": pairs},
        )

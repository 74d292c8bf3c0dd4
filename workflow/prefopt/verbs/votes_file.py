"""The verb ``disagreement``: how far the annotators of a file agree, and whether a model's dispersion follows them."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule
from prefopt.verbs.arguments import Verbs

if TYPE_CHECKING:
    import numpy as np

    from prefopt.annotators.votes import VotedPair, Votes
else:
    np = LazyModule("numpy")

log = logging.getLogger(__name__)

_CODES = {"a": 0, "b": 1, "tie": 2}
_FEW_VOTES = 5  # with fewer votes than that, an annotator's quality is mostly the prior
_SHOWN = 10


def add_verb(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Register the verb; nothing heavy is imported before it runs."""
    text = "agreement of several annotators in your own file, and whether a model's dispersion follows them"
    verb = verbs.add_parser("disagreement", parents=[common], help=text, description=text)
    verb.add_argument("--votes", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL, CSV or parquet")
    verb.add_argument("--reader", default="auto", help="form of the files (default: recognised by their keys)")
    verb.add_argument("--model", type=Path, metavar="FOLDER", help="causal language model whose entropies are compared")
    verb.add_argument(
        "--rewards", type=Path, nargs="+", metavar="FOLDER", help="reward models with --model's tokenizer"
    )
    verb.add_argument(
        "--samples", type=int, default=0, help="responses per prompt for the sequence entropy (default 0)"
    )
    verb.add_argument("--new-tokens", type=int, default=128, help="longest sampled response (default: %(default)s)")
    verb.add_argument("--max-length", type=int, help="longest prompt and response in tokens; longer pairs are left out")
    verb.add_argument(
        "--resamples", type=int, default=2000, help="of the bootstrap over prompts (default: %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    if given.resamples < 2 or given.samples < 0 or given.new_tokens < 1:
        raise BadInput("--resamples must be 2 or more, --samples 0 or more, --new-tokens 1 or more")
    if given.model is None and (given.rewards or given.samples or given.max_length):
        raise BadInput("--rewards, --samples and --max-length go with --model, whose tokenizer they use")
    from prefopt.annotators.readers import read_votes
    from prefopt.verbs.votes_and_model import against_model

    votes = read_votes(given.votes, given.reader)
    result = agreement_of(votes, resamples=given.resamples, seed=given.seed)
    if given.model is not None:
        try:
            result["model"] = against_model(votes, given)
        except BadInput as error:
            raise BadInput(f"{given.votes[0]} with {given.model}: {error}") from None
    print(json.dumps(result, ensure_ascii=False, allow_nan=False) if given.json else _text(result))


def agreement_of(votes: Votes, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Everything that the votes alone tell.

    ``agreement``: see ``agreement_summary``; ``annotators``: by Dawid and Skene's model, those with few votes last;
    ``systems``: Davidson strengths where systems are named, or why there are none; ``rankings``: Mallows-phi of every
    prompt with complete rankings.
    """
    from prefopt.annotators.agreement import agreement_summary, counts_of

    counts = counts_of(votes.pairs)
    return {
        "agreement": agreement_summary(counts, [p.prompt for p in votes.pairs], resamples=resamples, seed=seed),
        "annotators": _annotators(votes),
        "systems": _systems(votes.pairs, counts),
        "rankings": _rankings(votes),
    }


def _annotators(votes: Votes) -> dict[str, Any]:
    from prefopt.annotators.dawid_skene import dawid_skene

    ballots = votes.ballots()
    people, person = np.unique(ballots["annotator"].to_numpy(dtype=str), return_inverse=True)
    item = np.unique(ballots["pair"].to_numpy(), return_inverse=True)[1]
    if len(people) < 2:
        return {"count": len(people), "note": "one annotator: nothing to compare"}
    fitted = dawid_skene(item, person, ballots["vote"].map(_CODES).to_numpy(), len(_CODES))
    order = np.lexsort((-fitted.quality, fitted.votes < _FEW_VOTES))
    table = [
        {"annotator": str(people[j]), "quality": float(fitted.quality[j]), "votes": int(fitted.votes[j])} for j in order
    ]
    prior = dict(zip(_CODES, map(float, fitted.prior), strict=True))
    return {"count": len(people), "method": "Dawid-Skene", "true_votes": prior, "by_quality": table}


def _systems(pairs: Sequence[VotedPair], counts: np.ndarray) -> dict[str, Any] | None:
    from prefopt.annotators.davidson import davidson

    if not any(pair.system_a for pair in pairs):
        return None
    try:
        fitted = davidson([p.system_a for p in pairs], [p.system_b for p in pairs], counts)
    except BadInput as error:
        return {"note": str(error)}
    rows = zip(fitted.systems, fitted.strength, fitted.error, strict=True)
    return {
        "method": "Davidson" if fitted.nu else "Bradley-Terry, there are no ties",
        "nu": fitted.nu,
        "strengths": [{"system": name, "strength": float(s), "error": float(e)} for name, s, e in rows],
    }


def _rankings(votes: Votes) -> dict[str, Any] | None:
    from prefopt.annotators.agreement import phi_of_rankings
    from prefopt.annotators.votes import rankings_in_pairs

    ranked = votes.rankings or rankings_in_pairs(votes.pairs)
    fits = [fitted for one in ranked if (fitted := phi_of_rankings(one)) is not None]
    if not fits:
        return None
    phi = np.array([fitted["phi"] for fitted in fits])
    quartiles = dict(
        zip(("lowest", "q25", "median", "q75", "highest"), np.quantile(phi, [0, 0.25, 0.5, 0.75, 1]), strict=True)
    )
    return {
        "prompts": len(fits),
        "rankings": sum(fitted["rankings"] for fitted in fits),
        "with_ties": sum(fitted["ties"] for fitted in fits),
        "mean_phi": float(phi.mean()),
        "phi": {name: float(value) for name, value in quartiles.items()},
    }


# --- as text --------------------------------------------------------------------------------------------------------


def _text(result: dict[str, Any]) -> str:
    lines = [*_agreement_lines(result["agreement"]), *_annotator_lines(result["annotators"])]
    if result["systems"]:
        lines += _system_lines(result["systems"])
    if ranked := result["rankings"]:
        spread = ", ".join(f"{name} {value:.3f}" for name, value in ranked["phi"].items())
        lines += ["", f"rankings: {ranked['prompts']} prompts, Mallows phi: mean {ranked['mean_phi']:.3f}, {spread}"]
    if result.get("model"):
        lines += _model_lines(result["model"])
    return "\n".join(lines)


def _agreement_lines(found: dict[str, Any]) -> list[str]:
    from prefopt.annotators.estimates import interval_text

    unanimous = found["unanimous"]
    both, without_ties = (
        interval_text(found[name] | {"mean": found[name]["agreement"]})
        for name in ("pairwise", "pairwise_without_ties")
    )
    return [
        f"pairs                 {found['items']}, with two votes or more {found['items_with_several_votes']}",
        f"votes                 {found['votes']}, ties {found['ties']:.3f}, level pairs {found['level_items']}",
        f"unanimous             {interval_text(unanimous and unanimous | {'mean': unanimous['share']})}",
        f"two annotators agree  {both}",
        f"  without ties        {without_ties}",
        f"Krippendorff's alpha  {'–' if found['alpha'] is None else format(found['alpha'], '.3f')}",
    ]


def _annotator_lines(people: dict[str, Any]) -> list[str]:
    lines = ["", f"annotators: {people['count']}"]
    if "by_quality" in people:
        listed = people["by_quality"]
        lines[-1] += ", probability of the true vote after Dawid and Skene"
        lines += [f"  {row['annotator'][:40]:40} {row['quality']:.3f}  {row['votes']} votes" for row in listed[:_SHOWN]]
        if len(listed) > _SHOWN:
            lines.append(f"  and {len(listed) - _SHOWN} more, see --json")
    return lines


def _system_lines(systems: dict[str, Any]) -> list[str]:
    how = f": {systems['note']}" if "note" in systems else f", {systems['method']}, nu {systems['nu']:.3f}"
    shown = systems.get("strengths", [])[:_SHOWN]
    rows = [f"  {row['system'][:40]:40} {row['strength']:+.3f}  se {row['error']:.3f}" for row in shown]
    return ["", f"systems{how}", *rows]


def _model_lines(model: dict[str, Any]) -> list[str]:
    from prefopt.annotators.estimates import ESTIMATES, interval_text

    lines = ["", f"model against people, {model['pairs']} pairs of {model['prompts']} prompts, 95 % over prompts"]
    lines.append(f"  {'estimate':24} {'Spearman':24} {'at equal length':24} AUROC of split pairs")
    for name, one in model["estimates"].items():
        three = [interval_text(one["vote_entropy"].get(kind)) for kind in ("spearman", "partial")]
        lines.append(f"  {ESTIMATES[name]:24} {three[0]:24} {three[1]:24} {interval_text(one['auroc'])}")
    return [*lines, *(f"  left out: {count} {why}" for why, count in model["left_out"].items())]

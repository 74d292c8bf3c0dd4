"""The nodes of items about several annotators: their data sets, estimates of dispersion, and runs on their votes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.inputs.sources import data_identity, model_identity
from prefopt.planning.wiring import Wiring, check_lengths, plan_sft, resolve_arm
from prefopt.specs import DisagreementItemSpec, LossSpec, VoteWeightItemSpec

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan
    from prefopt.specs import ArmSpec, DataSpec

_ENSEMBLE = "ensemble"
_HEAD = {"kind": "exact"}  # numbers with claims about them, as an exact item has, whatever the scale


def _wired(plan: Plan, item: DisagreementItemSpec | VoteWeightItemSpec, data: DataSpec, data_root: Path) -> Wiring:
    """A data set with a model of its own: pairs, tokens, reference."""
    if data.source.kind != "votes":
        raise BadInput(f"data: a source of kind '{data.source.kind}' has no annotators; declare one of kind votes")
    spec, execution, name = data_identity(data, data_root)
    pairs = plan.add("pairs", name, spec, execution=execution)
    spec, execution, name = model_identity(item.model, data_root)
    base = plan.add("base", name, spec, {"pairs": pairs} if spec["kind"] == "scratch" else {}, execution)
    tokens = plan.add("tokens", pairs.name, item.tokens.model_dump(), {"pairs": pairs, "base": base})
    ensemble = item.rewards if isinstance(item, DisagreementItemSpec) else None
    return Wiring(
        plan,
        pairs=pairs,
        tokens=tokens,
        model=plan_sft(plan, item.sft, tokens, base),
        sampled=tokens,
        precision="fp32" if isinstance(item, DisagreementItemSpec) else item.policy.precision,
        quantize=None if isinstance(item, DisagreementItemSpec) else item.policy.quantize,
        rewards={_ENSEMBLE: ensemble} if ensemble else {},
        samples=item.samples if isinstance(item, DisagreementItemSpec) else None,
    )


def _item(plan: Plan, item: Any, study: str, made: Node, claims: list[dict[str, Any]]) -> Node:
    spec = {"item": item.item.model_dump() | _HEAD, "study": {"name": study, "params": {}}, "expect": claims}
    return plan.add(f"papers/{item.item.paper}", item.item.name, spec, {"study": made})


def plan_disagreement(plan: Plan, item: DisagreementItemSpec, data_root: Path) -> Node:
    """Every data set down to its estimates on the test split, their comparison, and the item."""
    check_lengths(item.model, item.tokens, [item.samples] if item.samples else [])
    if item.rewards is not None and (item.rewards.oracle or item.rewards.members < 2):
        raise BadInput("rewards: votes and variances need two trained members or more")
    parents: dict[str, Node] = {}
    for name, declared in item.annotated.items():
        wiring = _wired(plan, item, declared.data, data_root)
        parents[f"pairs.{name}"] = wiring.pairs
        parents[f"tokens.{name}"] = wiring.tokens
        parents[f"reference.{name}"] = wiring.reference
        if item.samples is not None:
            parents[f"samples.{name}"] = wiring.draw("samples", "test", item.samples_per_prompt)
        if item.rewards is not None:
            parents[f"rewards.{name}"] = wiring.ensembles.columns(_ENSEMBLE)
    spec = {
        "annotated": {name: declared.label or name for name, declared in item.annotated.items()},
        "resamples": item.resamples,
    }
    made = plan.add("disagreement", item.item.name, spec, parents)
    return _item(plan, item, "disagreement", made, [row.model_dump() for row in item.expect])


def _with_beta(arm: ArmSpec, beta: float) -> ArmSpec:
    loss = LossSpec(name=arm.loss.name, **arm.loss.params, beta=beta)
    return arm.model_copy(update={"loss": loss})


def _vote_trial(plan: Plan, item: VoteWeightItemSpec, name: str, beta: float, seed: int, *, wiring: Wiring) -> Node:
    arm = _with_beta(item.arms[name], beta)
    if arm.rounds is not None:
        raise BadInput(f"arms.{name}.rounds: an item on held-out votes trains every arm once; remove it")
    try:
        loss, params, regulariser, needs = resolve_arm(arm)
    except BadInput as error:
        raise BadInput(f"arms.{name}.loss: {error}") from None
    train = (arm.train or item.policy).model_dump()
    spec = {"loss": {"name": loss, "params": params}, "regulariser": regulariser, "train": train, "seed": seed}
    return plan.add("vote_trials", f"{loss}-s{seed}", spec, wiring.signals(name, arm, needs | {"reference"}))


def plan_vote_weight(plan: Plan, item: VoteWeightItemSpec, data_root: Path) -> Node:
    """Every arm with every beta and seed, their evaluation on held-out votes, and the item."""
    check_lengths(item.model, item.tokens, [])
    if item.data.splits.validation == 0:
        raise BadInput("data: its splits give validation no share; betas and scales are chosen there")
    if item.data.source.kind != "votes":
        raise BadInput(f"data: a source of kind '{item.data.source.kind}' has no annotators; declare one of kind votes")
    for row in item.expect:
        if row.pairs == "seen" and item.data.source.hold_out is None:
            raise BadInput("expect: a claim on seen pairs needs votes held out; set the source's 'hold_out'")
        for arm in (row.arm, row.than):
            if arm not in item.arms:
                raise BadInput(f"expect: no arm '{arm}'; {nearest(arm, item.arms)}")
    wiring = _wired(plan, item, item.data, data_root)
    parents: dict[str, Node] = {"pairs": wiring.pairs}
    for name in item.arms:
        for number, beta in enumerate(item.betas):
            for seed in item.seeds:
                parents[f"run.{name}.{number}.{seed}"] = _vote_trial(plan, item, name, beta, seed, wiring=wiring)
    contrasts = sorted({(row.arm, row.than) for row in item.expect})
    spec = {
        "arms": list(item.arms),
        "betas": item.betas,
        "seeds": item.seeds,
        "first_metric": item.held_out_votes,
        "contrasts": [list(pair) for pair in contrasts],
    }
    made = plan.add("vote_weights", item.item.name, spec, parents)
    return _item(plan, item, "vote_weights", made, [_claim(row.model_dump()) for row in item.expect])


def _claim(row: dict[str, Any]) -> dict[str, Any]:
    """A claim about two arms as one about the number that holds their difference, with its interval."""
    value = f"{row['pairs']}.{row['arm']}.over.{row['than']}.{row['metric']}"
    limits = [f"{value}.low", f"{value}.high"]
    return {"claim": row["claim"], "value": value, "above": 0.0, "interval": limits, "source": row["source"]}

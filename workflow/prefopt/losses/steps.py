"""The six steps that a pair loss is made of, each a small table of pure functions.

A loss is a choice in every step: token aggregation and reference give the log-ratios of both responses, margin parts
turn them into beta * difference + shift, a link makes a loss of that, add-ons are added, weights multiply the sum.
Keyword-only parameters of a step's function are its settings; a name means one thing in all steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("aggregation", "reference", "margin", "link", "addon", "weight")
SEVERAL = frozenset({"margin", "addon", "weight"})
"""Kinds of which a loss may take none, one or several; of the others it takes exactly one."""

NEEDS = frozenset(
    {
        "reference",
        "dispersion",
        "rewards",
        "vote_share",
        "tokens",
        "reference_samples",
        "subset",
        "diff",
        "second_reference",
        "win_rates",
        "auxiliary",
        "reward_head",
        "responsibilities",
        "advantages",
        "gap_state",
    }
)


class Reference(NamedTuple):
    """What a policy is compared with: log-probabilities [B], and per token [B, T] where they are known."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None


class Ratios(NamedTuple):
    """Aggregated log-ratios of the chosen and the rejected response and their difference, each [B] in nats."""

    chosen: Tensor
    rejected: Tensor
    difference: Tensor


class Terms(NamedTuple):
    """A margin in the making: beta * difference + shift. beta is a number or [B], everything else [B]."""

    beta: float | Tensor
    chosen: Tensor
    rejected: Tensor
    difference: Tensor
    shift: Tensor | float | None = None

    @property
    def z(self) -> Tensor:
        """beta * difference + shift."""
        scaled = self.beta * self.difference
        return scaled if self.shift is None else scaled + self.shift

    @property
    def unscaled(self) -> Tensor:
        """difference + shift / beta."""
        return self.difference if self.shift is None else self.difference + self.shift / self.beta

    def shifted(self, by: Tensor | float) -> Terms:
        """With ``by`` added to the shift."""
        return self._replace(shift=by if self.shift is None else self.shift + by)


@dataclass(frozen=True)
class Step:
    """One choice in one step.

    ``level`` of an aggregation: ``tokens`` where it needs a reference's single tokens. ``knows`` of a reference: the
    finest level it has. ``changes`` of a margin part: ``sides``, ``scale`` or ``shift``. ``reads`` of a link: the
    ``margin``, both ``sides`` on their own (which have no shift), or ``nothing`` of what came before.
    """

    kind: str
    name: str
    fn: Callable[..., Any]
    needs: frozenset[str]
    couples_pairs: bool = False
    level: str = "sequence"
    knows: str = "tokens"
    changes: str = "sides"
    reads: str = "margin"

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters by name."""
        found = inspect.signature(self.fn).parameters.values()
        return {item.name: item for item in found if item.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def about(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").splitlines()[0]


_steps: dict[str, dict[str, Step]] = {kind: {} for kind in KINDS}
STEPS: Mapping[str, Mapping[str, Step]] = MappingProxyType({kind: MappingProxyType(_steps[kind]) for kind in KINDS})


def step(kind: str, name: str, *, needs: set[str] | None = None, **traits: Any) -> Callable[[Callable], Callable]:
    """Register a step's function under a name; ``traits`` are fields of Step. ValueError for a name that is taken."""

    def register(fn: Callable) -> Callable:
        unknown = set(needs or ()) - NEEDS
        if unknown or name in _steps[kind]:
            raise ValueError(f"cannot register {kind} '{name}': {f'unknown needs {unknown}' if unknown else 'taken'}")
        _steps[kind][name] = Step(kind, name, fn, frozenset(needs or ()), **traits)
        return fn

    return register


@dataclass(frozen=True)
class Combination:
    """One choice for every step; ``margin``, ``addon`` and ``weight`` may be several or none."""

    aggregation: Step
    reference: Step
    margin: tuple[Step, ...]
    link: Step
    addon: tuple[Step, ...]
    weight: tuple[Step, ...]

    @property
    def steps(self) -> list[Step]:
        """All of them, in the order in which they act; those whose result the link does not read are left out."""
        first = [] if self.link.reads == "nothing" else [self.aggregation, self.reference, *self.margin]
        return [*first, self.link, *self.addon, *self.weight]

    @property
    def needs(self) -> frozenset[str]:
        """What the batch has to hold."""
        return frozenset().union(*(one.needs for one in self.steps))

    @property
    def couples_pairs(self) -> bool:
        """Whether the value for one pair depends on the others of the batch."""
        return any(one.couples_pairs for one in self.steps)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """beta and the steps' own parameters by name."""
        beta = inspect.Parameter("beta", inspect.Parameter.KEYWORD_ONLY, annotation=float)
        return {"beta": beta} | {name: item for one in self.steps for name, item in one.parameters.items()}

    def __call__(self, batch: Any, *, beta: float, **settings: Any) -> Tensor:
        """The loss of every pair [B]."""

        def own(one: Step) -> dict[str, Any]:
            return {name: settings[name] for name in one.parameters if name in settings}

        terms = None
        if self.link.reads != "nothing":
            reference = self.reference.fn(batch, **own(self.reference))
            terms = Terms(beta, *self.aggregation.fn(batch, reference, **own(self.aggregation)))
            for part in self.margin:
                terms = part.fn(batch, terms, **own(part))
        value = self.link.fn(batch, terms, **own(self.link))
        for part in self.addon:
            value = value + part.fn(batch, beta, **own(part))
        for part in self.weight:
            value = value * part.fn(batch, terms, **own(part))
        return value


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"aggregation": "sum", "reference": "single", "margin": [], "link": "logistic", "addon": [], "weight": []}
)
"""What a combination takes in the steps that it does not name: this is DPO."""


def combination(place: str, choices: Mapping[str, Any]) -> Combination:
    """The steps named in ``choices`` (kind -> name, or list of names where several may be), else the defaults.

    Raises BadInput for unknown names and for steps that do not go together; ``place`` begins the message.
    """
    chosen = {kind: _chosen(place, kind, choices.get(kind, DEFAULTS[kind])) for kind in KINDS}
    steps: dict[str, Any] = {kind: found if kind in SEVERAL else found[0] for kind, found in chosen.items()}
    made = Combination(**steps)
    _check_fit(place, made, choices)
    return made


def _chosen(place: str, kind: str, given: Any) -> tuple[Step, ...]:
    names = given if isinstance(given, list | tuple) and kind in SEVERAL else [given]
    for name in names:
        if not isinstance(name, str) or name not in STEPS[kind]:
            several = " or a list of names" if kind in SEVERAL else ""
            if not isinstance(name, str):
                raise BadInput(f"{place}: {kind} is {name!r} ({type(name).__name__}); expected a name{several}")
            raise BadInput(f"{place}: unknown {kind} '{name}'; {nearest(name, STEPS[kind])}")
        if list(names).count(name) > 1:
            raise BadInput(f"{place}: {kind} '{name}' stands more than once")
    return tuple(STEPS[kind][name] for name in names)


def _check_fit(place: str, made: Combination, choices: Mapping[str, Any]) -> None:
    link, first = made.link, (made.aggregation, made.reference, *made.margin)
    if link.reads == "nothing":
        unread = [kind for kind in KINDS[:3] if choices.get(kind, DEFAULTS[kind]) != DEFAULTS[kind]]
        if unread:
            raise BadInput(f"{place}: link '{link.name}' does not look at the margin; leave out '{unread[0]}'")
        readers = [part for part in made.weight if part.reads == "margin"]
        if readers:
            raise BadInput(f"{place}: weight '{readers[0].name}' reads the margin, which link '{link.name}' has not")
    elif made.aggregation.level == "tokens" and made.reference.knows == "sequence":
        raise BadInput(
            f"{place}: aggregation '{made.aggregation.name}' needs single tokens, and the reference "
            f"'{made.reference.name}' knows whole responses alone; use the aggregation 'sum' or 'mean'"
        )
    if link.reads == "sides" and (shifts := [part.name for part in made.margin if part.changes == "shift"]):
        raise BadInput(f"{place}: margin '{shifts[0]}' adds a shift, and link '{link.name}' reads both sides alone")
    owner: dict[str, Step] = {}
    for one in (*(first if link.reads != "nothing" else ()), link, *made.addon, *made.weight):
        for name in one.parameters:
            if name in owner:
                taken = owner[name]
                raise BadInput(
                    f"{place}: {taken.kind} '{taken.name}' and {one.kind} '{one.name}' both take '{name}'; choose one"
                )
            owner[name] = one

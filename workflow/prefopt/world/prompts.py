"""Prompts of the demo world: every question that can be asked, and what a question asks for."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache

from prefopt.errors import BadInput
from prefopt.world import lexicon as lex

DOMAINS = ("home", "away")
FACT_SHARE = 0.65  # of closed prompts; the others are sums

# Both domains use the same words; the away domain puts them into phrasings, and pairs of topics, never met at home.
FACT_PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "home": {
        "colour": (
            "what colour is the {a}",
            "which colour does the {a} have",
            "tell me the colour of the {a}",
            "the {a} has which colour",
        ),
        "home": (
            "where does the {a} live",
            "in which home does the {a} live",
            "tell me the home of the {a}",
            "where is the home of the {a}",
        ),
        "food": (
            "what does the {a} eat",
            "which food does the {a} eat",
            "tell me the food of the {a}",
            "what is the food of the {a}",
        ),
    },
    "away": {
        "colour": ("the colour of the {a} is what", "describe the colour of the {a}", "give me the colour of a {a}"),
        "home": ("the home of the {a} is where", "describe the home of the {a}", "give me the home of a {a}"),
        "food": ("the food of the {a} is what", "describe the food of the {a}", "give me the food of a {a}"),
    },
}
SUM_PHRASINGS = {
    "home": ("what is {a} plus {b}", "add {a} and {b}", "how much is {a} and {b}", "tell me the sum of {a} and {b}"),
    "away": ("{a} plus {b} is how much", "give me {a} plus {b}", "the sum of {a} and {b} is what"),
}
_GREETINGS, _LEADS = ("", "hello ", "well ", "today "), ("", "please ", "so ", "now ")
CLOSED_FRAMES = {
    "home": tuple(f"{greeting}{lead}{{q}}" for greeting in _GREETINGS for lead in _LEADS),
    "away": tuple(f"{lead}{greeting}{{q}}" for greeting in _GREETINGS for lead in _LEADS),
}
OPEN_PHRASINGS = {
    "home": (
        "tell a {p} about the {t} in {s}",
        "describe the {t} in {s} to a {p}",
        "write a note to a {p} about the {t} in {s}",
        "what should a {p} know about the {t} in {s}",
        "give a {p} a picture of the {t} in {s}",
        "how does the {t} look to a {p} in {s}",
        "a {p} wants to hear about the {t} in {s}",
        "write about the {t} for a {p} in {s}",
    ),
    "away": (
        "tell a {p} about the {t} and the {u}",
        "describe to a {p} both the {t} and the {u}",
        "write a {p} a picture of the {t} with the {u}",
        "how does the {t} look from the {u} to a {p}",
        "what should a {p} hear about the {t} and the {u}",
        "a {p} wants a note about the {t} with the {u}",
    ),
}
# Words that the away phrasings alone would introduce are taught by these home frames.
OPEN_FRAMES = {"home": ("{q}", "from one friend {q}", "both ask {q}"), "away": ("{q}",)}


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, read from its words alone."""

    form: str  # "fact", "sum" or "open"
    subjects: tuple[str, ...]  # the animal, the two addends, or the topic(s)
    attribute: str = ""  # fact: which attribute
    answer: str = ""  # closed forms: the one right word
    options: tuple[str, ...] = ()  # closed forms: every word that could be given as the answer
    season: str = ""
    person: str = ""
    relevant: frozenset[str] = frozenset()  # content words that belong into an answer

    @property
    def kind(self) -> str:
        """ "closed" (one right answer) or "open" (many acceptable ones)."""
        return "open" if self.form == "open" else "closed"


@lru_cache(maxsize=65536)
def asked(prompt: str) -> Asked | None:
    """Read a prompt of either domain, in any phrasing; None where it asks for nothing this world knows."""
    words = prompt.split()
    topics = _distinct(words, lex.TOPICS)
    animals = _distinct(words, lex.ANIMALS)
    numbers = [word for word in words if word in lex.ADDENDS]
    if topics:
        return _asked_open(words, topics)
    if len(animals) == 1:
        return _asked_fact(words, animals[0])
    return _asked_sum(numbers) if len(numbers) == 2 else None


def _distinct(words: list[str], known: dict) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in words if word in known))


def _asked_open(words: list[str], topics: tuple[str, ...]) -> Asked:
    season = next((word for word in words if word in lex.SEASONS), "")
    # The last person named is the one addressed: a frame may name the one who asks.
    person = next((word for word in reversed(words) if word in lex.PEOPLE), "")
    relevant = {*topics, season, person, *lex.SEASONS.get(season, ())} - {""}
    for topic in topics:
        things, doings = lex.TOPICS[topic]
        relevant.update(things, doings)
    return Asked("open", topics, season=season, person=person, relevant=frozenset(relevant))


def _asked_fact(words: list[str], animal: str) -> Asked | None:
    keywords = {"colour": "colour", "home": "home", "live": "home", "food": "food", "eat": "food"}
    attribute = next((keywords[word] for word in words if word in keywords), "")
    if not attribute:
        return None
    answer = lex.ANIMALS[animal][lex.ATTRIBUTES.index(attribute)]
    return Asked("fact", (animal,), attribute, answer, lex.VALUES[attribute], relevant=frozenset((animal, answer)))


def _asked_sum(numbers: list[str]) -> Asked:
    answer = lex.NUMBERS[sum(lex.NUMBERS.index(word) + 1 for word in numbers) - 1]
    return Asked("sum", tuple(numbers), "", answer, lex.NUMBERS, relevant=frozenset((*numbers, answer)))


@lru_cache(maxsize=8)
def all_prompts(domain: str, form: str) -> tuple[str, ...]:
    """Every distinct prompt of one form ("fact", "sum", "open") in one domain."""
    if form == "open":
        second = lex.SEASONS if domain == "home" else lex.TOPICS
        questions = [
            phrasing.format(t=topic, s=other, u=other, p=person)
            for phrasing in OPEN_PHRASINGS[domain]
            for topic, other, person in itertools.product(lex.TOPICS, second, lex.PEOPLE)
            if topic != other
        ]
        frames = OPEN_FRAMES[domain]
    else:
        questions = _closed_questions(domain, form)
        frames = CLOSED_FRAMES[domain]
    return tuple(frame.format(q=question) for question, frame in itertools.product(questions, frames))


def _closed_questions(domain: str, form: str) -> list[str]:
    if form == "fact":
        return [
            phrasing.format(a=animal)
            for phrasings in FACT_PHRASINGS[domain].values()
            for phrasing, animal in itertools.product(phrasings, lex.ANIMALS)
        ]
    return [
        phrasing.format(a=first, b=second)
        for phrasing in SUM_PHRASINGS[domain]
        for first, second in itertools.product(lex.ADDENDS, repeat=2)
    ]


def draw_prompts(domain: str, count: int, closed_fraction: float, seed: int) -> list[str]:
    """`count` distinct prompts, a share `closed_fraction` of them closed, in random order.

    Raises BadInput where the domain has fewer prompts of a form than asked for.
    """
    closed = round(count * closed_fraction)
    facts = round(closed * FACT_SHARE)
    wanted = {"fact": facts, "sum": closed - facts, "open": count - closed}
    rng = random.Random(f"{seed}/{domain}/prompts")
    drawn: list[str] = []
    for form, number in wanted.items():
        available = all_prompts(domain, form)
        if number > len(available):
            raise BadInput(
                f"world: {number} prompts of the form '{form}' wanted, the domain '{domain}' has {len(available)}: "
                f"lower `prompts` (now {count}) or change `closed_fraction` (now {closed_fraction})"
            )
        drawn += rng.sample(available, number)
    rng.shuffle(drawn)
    return drawn

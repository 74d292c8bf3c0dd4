"""Responses of the demo world: candidates of mixed quality, and the best one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean

from prefopt.errors import BadInput
from prefopt.world import lexicon as lex
from prefopt.world.oracle import oracle_reward
from prefopt.world.prompts import Asked, asked

MAX_RESPONSE_WORDS = 48
BOUNDING_CANDIDATES = 20

# Quality of candidates, drawn once per response.
RIGHT = 0.68  # closed: share that gives the right answer
SLIPS = (0.0, 0.0, 0.1, 0.2, 0.4)  # open: chance of each named word to be off the topic
MOODS = (0.2, 0.5, 0.8)  # open: chance of a coloured word to be positive
SCRAMBLED = 0.08  # share with one sentence out of order
REPEATED = 0.08  # share of open responses that say a sentence twice
SENTENCES, SENTENCE_WEIGHTS = (1, 2, 3, 4, 5), (4, 5, 6, 4, 3)
PREFACED = 0.4
REMARK_WEIGHTS = {"": 0.4, "sure": 0.39, "unsure": 0.21}
LONG_REMARK = 0.4

_ALL_THINGS = tuple(word for word, name in lex.CLASS.items() if name == "THING")
_ALL_DOINGS = tuple(word for word, name in lex.CLASS.items() if name == "DO")


def candidates(prompt: str, count: int, rng: random.Random) -> list[str]:
    """`count` distinct responses of mixed quality, most of them well-formed, in random order."""
    question = _known(prompt)
    write = _open_response if question.kind == "open" else _closed_response
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[write(question, rng)] = None
    return list(texts)


def oracle_best(prompt: str) -> str:
    """A response with (nearly) the highest oracle reward. Raises BadInput on a prompt that asks for nothing known."""
    question = _known(prompt)
    if question.kind == "closed":
        return _text([_preface(question), _answer(question, question.answer), lex.SURE[-1]])
    things = [word for topic in question.subjects for word in lex.TOPICS[topic][0]]
    doing = lex.TOPICS[question.subjects[0]][1][0]
    opening = f"in {question.season}" if question.season else f"in the {question.subjects[0]}"
    sentences = [f"{opening} a {question.person} can {doing} the {things[0]} with the {things[1]}"]
    sentences += [
        f"the {first} near the {second} is {good}"
        for first, second, good in zip(things[2:8:2], things[3:8:2], lex.POSITIVE, strict=False)
    ]
    return _text(sentences)


def bounds(prompts: Sequence[str]) -> dict[str, float]:
    """Mean oracle reward over prompts of three kinds of answers, to tell where a policy stands.

    "random": words drawn at random, as many as a candidate has; "written": a random candidate; "best": `oracle_best`;
    20 per prompt of the first two. Equal prompts give equal numbers, in any order up to rounding. Raises BadInput
    without prompts, and on a prompt that asks for nothing known.
    """
    if not prompts:
        raise BadInput("world: bounds of no prompts at all; give at least one")
    words = [lex.END, *sorted(lex.CLASS)]
    rewards: dict[str, list[float]] = {"random": [], "written": [], "best": []}
    for prompt in prompts:
        rng = random.Random(f"{prompt}/bounds")
        # One at a time: distinct ones would leave out repetitions, which for closed prompts are mostly right answers.
        drawn = [candidates(prompt, 1, rng)[0] for _ in range(BOUNDING_CANDIDATES)]
        rewards["written"] += [oracle_reward(prompt, text) for text in drawn]
        noise = [" ".join(rng.choices(words, k=len(text.split()))) for text in drawn]
        rewards["random"] += [oracle_reward(prompt, text) for text in noise]
        rewards["best"].append(oracle_reward(prompt, oracle_best(prompt)))
    return {name: fmean(values) for name, values in rewards.items()}


def _known(prompt: str) -> Asked:
    question = asked(prompt)
    if question is None:
        raise BadInput(f"world: the prompt {prompt!r} asks for nothing the demo world knows: use its own prompts")
    return question


def _text(sentences: list[str]) -> str:
    return " ".join(f"{sentence} {lex.END}" for sentence in sentences if sentence)


def _preface(question: Asked) -> str:
    return lex.PREFACES[question.form].replace("ANIMAL", question.subjects[0])


def _answer(question: Asked, answer: str) -> str:
    """The sentence that gives one answer, right or wrong, to a closed question."""
    if question.form == "fact":
        sentence = lex.FACT_SENTENCES[question.attribute].replace("ANIMAL", question.subjects[0])
        return sentence.replace(question.attribute.upper(), answer)
    first, second = question.subjects
    return f"{first} plus {second} is {answer}"


def _wrong(question: Asked, rng: random.Random) -> str:
    if question.form != "sum":
        return rng.choice([option for option in question.options if option != question.answer])
    right = lex.NUMBERS.index(question.answer)
    near = [right + step for step in (-3, -2, -1, 1, 2, 3) if 0 <= right + step < len(lex.NUMBERS)]
    return lex.NUMBERS[rng.choice(near)]


def _closed_response(question: Asked, rng: random.Random) -> str:
    if rng.random() < RIGHT:
        answers = [_answer(question, question.answer)]
    elif rng.random() < 0.85:
        answers = [_answer(question, _wrong(question, rng))]
    else:
        answers = [_answer(question, question.answer), _answer(question, _wrong(question, rng))]
        rng.shuffle(answers)
    if rng.random() < SCRAMBLED:
        answers[-1] = _scramble(answers[-1], rng)
    preface = _preface(question) if rng.random() < PREFACED else ""
    return _text([preface, *answers, _remark(rng)])


def _remark(rng: random.Random) -> str:
    tone = rng.choices(list(REMARK_WEIGHTS), list(REMARK_WEIGHTS.values()))[0]
    if not tone:
        return ""
    return (lex.SURE if tone == "sure" else lex.UNSURE)[rng.random() < LONG_REMARK]


def _scramble(sentence: str, rng: random.Random) -> str:
    words = sentence.split()
    rng.shuffle(words)
    return " ".join(words)


class _OpenWriter:
    """Fills sentence patterns for one response, with its own rate of slips and its own mood."""

    def __init__(self, question: Asked, rng: random.Random) -> None:
        self.question, self.rng = question, rng
        self.slip, self.mood = rng.choice(SLIPS), rng.choice(MOODS)
        subjects = [lex.TOPICS[topic] for topic in question.subjects]
        self.things = [word for things, _ in subjects for word in things]
        self.things += lex.SEASONS.get(question.season, ())
        self.doings = [word for _, doings in subjects for word in doings]
        rng.shuffle(self.things)
        rng.shuffle(self.doings)

    def sentence(self) -> str:
        opened = self.rng.random() < 0.3
        if opened:
            first_of_season = len(lex.OPENED_SENTENCES) // 2
            seasonal = bool(self.question.season) and self.rng.random() < 0.75
            patterns = lex.OPENED_SENTENCES[:first_of_season] if seasonal else lex.OPENED_SENTENCES[first_of_season:]
        else:
            patterns = lex.PLAIN_SENTENCES
        return " ".join([self.word(slot) if slot.isupper() else slot for slot in self.rng.choice(patterns).split()])

    def word(self, slot: str) -> str:
        rng, off = self.rng, self.rng.random() < self.slip
        match slot:
            case "THING":
                return rng.choice(_ALL_THINGS) if off else self._next(self.things)
            case "DO":
                return rng.choice(_ALL_DOINGS) if off else self._next(self.doings)
            case "TOPIC":
                return rng.choice(list(lex.TOPICS)) if off else rng.choice(self.question.subjects)
            case "SEASON":
                return rng.choice(list(lex.SEASONS)) if off else self.question.season
            case "PERSON":
                return rng.choice(lex.PEOPLE) if off else self.question.person
            case _:
                return self._describing()

    def _next(self, words: list[str]) -> str:
        """The word used longest ago, so that words come back only when all were used."""
        words.append(words.pop(0))
        return words[-1]

    def _describing(self) -> str:
        if self.rng.random() < 0.25:
            return self.rng.choice(lex.NEUTRAL)
        return self.rng.choice(lex.POSITIVE if self.rng.random() < self.mood else lex.NEGATIVE)


def _open_response(question: Asked, rng: random.Random) -> str:
    writer = _OpenWriter(question, rng)
    sentences = [writer.sentence() for _ in range(rng.choices(SENTENCES, SENTENCE_WEIGHTS)[0])]
    if rng.random() < SCRAMBLED:
        spot = rng.randrange(len(sentences))
        sentences[spot] = _scramble(sentences[spot], rng)
    if rng.random() < REPEATED:
        sentences.append(rng.choice(sentences))
    while sum(len(sentence.split()) + 1 for sentence in sentences) > MAX_RESPONSE_WORDS:
        sentences.pop()
    return _text(sentences)

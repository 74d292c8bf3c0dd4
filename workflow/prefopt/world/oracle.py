"""The known truth of the demo world: what a response to a prompt is worth."""

from __future__ import annotations

import math

from prefopt.world import lexicon as lex
from prefopt.world.prompts import Asked, asked

# Calibrated: of candidate pairs that differ by at least 10 % in length, the oracle prefers the longer in 61 %.
LENGTH_PREFERENCE = 1.15
LENGTH_SCALE = 15.0  # words; the preference is 63 % used up there

ANSWER_WEIGHT = 3.0
CONTRADICTED, BARE_ANSWER = 0.2, 0.3  # shares of it: with another answer beside it, outside any sentence
FOCUS_WEIGHT = 0.5
UNSURE_PENALTY = 0.8
RELEVANCE_WEIGHT = 3.0
COVERAGE_WEIGHT = 0.5
COVERAGE_FULL = 3  # distinct relevant things and doings; more of them earn nothing
GRAMMAR_WEIGHT = 1.0
POLARITY_WEIGHT = 0.3

_POSITIVE, _NEGATIVE = frozenset(lex.POSITIVE), frozenset(lex.NEGATIVE)
_UNSURE = frozenset(tuple(sentence.split()) for sentence in lex.UNSURE)
_NAMING = frozenset(("THING", "DO", "TOPIC", "SEASON", "PERSON", "ANIMAL", "COLOUR", "HOME", "FOOD", "NUMBER"))
_NAMING_WORDS = frozenset(word for word, name in lex.CLASS.items() if name in _NAMING)
_COVERING_WORDS = frozenset(word for word, name in lex.CLASS.items() if name in ("THING", "DO"))

Sentence = tuple[str, ...]


def polarity(response: str) -> float:
    """(positive - negative) / (positive + negative) words of a response, in [-1, 1]; 0 without either."""
    words = response.split()
    positive = sum(word in _POSITIVE for word in words)
    negative = sum(word in _NEGATIVE for word in words)
    return (positive - negative) / (positive + negative) if positive + negative else 0.0


def oracle_reward(prompt: str, response: str, length_preference: float = LENGTH_PREFERENCE) -> float:
    """True reward of a response: the sum of `reward_parts`. Judges any text, 0 for an empty one, and never raises."""
    return sum(reward_parts(prompt, response, length_preference).values())


def reward_parts(prompt: str, response: str, length_preference: float = LENGTH_PREFERENCE) -> dict[str, float]:
    """What the true reward is made of.

    closed  answer, focus (words named that belong to the question), unsure (negative)
    open    relevance (share of named words that belong to the topic and are not repeated), coverage, polarity
    both    grammar (share of words in well-formed sentences, each counted once), and
            length = length_preference (1 - exp(-n / 15)), n = words in well-formed sentences, each counted once
    """
    question = asked(prompt)
    complete, fragment = _sentences(response)
    formed = _well_formed(complete)
    formed_words = sum(len(sentence) + 1 for sentence in formed)
    total_words = sum(len(sentence) + 1 for sentence in complete) + len(fragment)
    parts = {
        "grammar": GRAMMAR_WEIGHT * formed_words / total_words if total_words else 0.0,
        "length": length_preference * -math.expm1(-formed_words / LENGTH_SCALE),
    }
    if question is None:
        return parts
    named = [word for sentence in (*complete, fragment) for word in sentence if word in _NAMING_WORDS]
    if question.kind == "closed":
        return parts | _closed_parts(question, (*complete, fragment), frozenset(formed), named)
    return parts | _open_parts(question, formed, named, polarity(response))


def _sentences(response: str) -> tuple[list[Sentence], Sentence]:
    """The sentences that end with a full stop, and the words after the last one."""
    *complete, fragment = response.split(lex.END)
    return [tuple(sentence.split()) for sentence in complete], tuple(fragment.split())


def _well_formed(sentences: list[Sentence]) -> list[Sentence]:
    """The distinct sentences that follow one of the known patterns."""
    return [
        sentence
        for sentence in dict.fromkeys(sentences)
        if tuple([lex.CLASS.get(word, word) for word in sentence]) in lex.PATTERNS
    ]


def _closed_parts(
    question: Asked, sentences: tuple[Sentence, ...], formed: frozenset[Sentence], named: list[str]
) -> dict[str, float]:
    stated = {sentence: _stated(question, sentence) for sentence in sentences}
    answers = {word for words in stated.values() for word in words}
    answer = 0.0
    if question.answer in answers:
        in_a_sentence = any(question.answer in words for sentence, words in stated.items() if sentence in formed)
        answer = CONTRADICTED if len(answers) > 1 else (1.0 if in_a_sentence else BARE_ANSWER)
    # A wrong answer of the right kind names what was asked about: focus does not give the answer away twice.
    fitting = sum(word in question.relevant or word in question.options for word in named)
    return {
        "answer": ANSWER_WEIGHT * answer,
        "focus": FOCUS_WEIGHT * fitting / len(named) if named else 0.0,
        "unsure": -UNSURE_PENALTY * any(sentence in _UNSURE for sentence in sentences),
    }


def _stated(question: Asked, sentence: Sentence) -> list[str]:
    """The answers to a closed question that one sentence states."""
    if question.form == "sum":
        return _stated_sum(question, sentence)
    about_another = any(word in lex.ANIMALS and word not in question.subjects for word in sentence)
    return [] if about_another else [word for word in sentence if word in question.options]


def _stated_sum(question: Asked, sentence: Sentence) -> list[str]:
    start = sentence.index("is") if "is" in sentence else 0
    addends = [word for word in sentence[:start] if word in lex.NUMBERS]
    if addends and sorted(addends) != sorted(question.subjects):
        return []
    results = [word for word in sentence[start:] if word in lex.NUMBERS]
    return results if start or len(results) == 1 else []


def _open_parts(question: Asked, formed: list[Sentence], named: list[str], tone: float) -> dict[str, float]:
    in_sentences = [word for sentence in formed for word in sentence]
    covering = [word for word in in_sentences if word in _COVERING_WORDS]
    relevant = sum(word in question.relevant for word in in_sentences)
    covered = {word for word in covering if word in question.relevant}
    distinct = len(set(covering)) / len(covering) if covering else 0.0
    return {
        "relevance": RELEVANCE_WEIGHT * distinct * relevant / len(named) if named else 0.0,
        "coverage": COVERAGE_WEIGHT * min(1.0, len(covered) / COVERAGE_FULL),
        "polarity": POLARITY_WEIGHT * tone,
    }

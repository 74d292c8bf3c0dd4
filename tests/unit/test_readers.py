"""Readers: what each format's rows become, what is refused and with which words."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.errors import BadInput
from prefopt.readers import READERS, find_reader, read_row
from prefopt.readers.raw import REASONS, BadRow, RawPair, Refused, meta_json


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = {
    "chosen": "\n\nHuman: One plus one?\n\nAssistant: Two.\n\nHuman: And one?\n\nAssistant: Three.\n",
    "rejected": "\n\nHuman: One plus one?\n\nAssistant: Two.\n\nHuman: And one?\n\nAssistant: Four.",
}
TRL = {"prompt": "One plus one?", "chosen": "Two.", "rejected": "Three."}
ULTRAFEEDBACK = {
    "prompt": "One plus one?",
    "chosen": [user("One plus one?"), assistant("Two.")],
    "rejected": [user("One plus one?"), assistant("Three.")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
SHP = {
    "history": "Why is bread brown?",
    "human_ref_A": "Maillard.",
    "human_ref_B": "Paint.",
    "labels": 1,
    "score_A": 30,
    "score_B": 2,
}
TLDR = {
    "info": {"id": "t3_1", "post": "My cat sat on the mat.", "title": "Cat", "subreddit": "aww"},
    "summaries": [{"text": " Dog ran."}, {"text": " Cat sat."}],
    "choice": 1,
}
IMDB = {"prompt": "This film is", "chosen": " a joy.", "rejected": " a bore."}
STACK_EXCHANGE = {
    "qid": 7,
    "question": "<p>Why is <b>bread</b> brown?</p>",
    "answers": [
        {"text": "<p>Paint &amp; varnish.</p>", "pm_score": -1},
        {"text": "<p>Maillard.</p>\n\n\n\n<ul><li>sugar</li><li>heat</li></ul>", "pm_score": 4},
        {"text": "<p>Magic.</p>", "pm_score": 0},
    ],
}
ROWS = {
    "hh": HH,
    "trl": TRL,
    "ultrafeedback": ULTRAFEEDBACK,
    "shp": SHP,
    "stack_exchange": STACK_EXCHANGE,
    "tldr": TLDR,
    "imdb_prefix": IMDB,
}


def read(name, row):
    pair = read_row(READERS[name], row)
    return pair.prompt, pair.chosen, pair.rejected


def test_every_reader_has_an_example_here():
    assert set(ROWS) == set(READERS)


def test_hh_transcript_splits_at_the_last_assistant_turn():
    prompt = [user("One plus one?"), assistant("Two."), user("And one?")]
    assert read("hh", HH) == (prompt, "Three.", "Four.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b ", "identical pair"),
        ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant: b", "empty chosen"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "empty rejected"),
        ("\n\nHuman: \n\nAssistant: b", "\n\nHuman: \n\nAssistant: c", "empty prompt"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c", "differs before the last turn"),
        (
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "differs before the last turn",
        ),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "no assistant turn at the end"),
        ("", "\n\nHuman: a\n\nAssistant: b", "no assistant turn at the end"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no user turn at the start"),
        ("said\n\nHuman: a\n\nAssistant: b", "said\n\nHuman: a\n\nAssistant: c", "no user turn at the start"),
        ("\n\nHuman: a\n\nAssistant: \ud800", "\n\nHuman: a\n\nAssistant: c", "broken unicode"),
    ],
)
def test_hh_refusals(chosen, rejected, reason):
    with pytest.raises(Refused) as refusal:
        read("hh", {"chosen": chosen, "rejected": rejected})
    assert refusal.value.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    "row",
    [
        TRL,
        {"prompt": [user("One plus one?")], "chosen": [assistant("Two.")], "rejected": [assistant("Three.")]},
        {"prompt": [user("One plus one?")], "chosen": "Two.", "rejected": "Three."},
        {k: v for k, v in ULTRAFEEDBACK.items() if k in ("chosen", "rejected")},
        {k: v for k, v in ULTRAFEEDBACK.items() if not k.startswith("score")},
    ],
)
def test_trl_forms_of_one_pair_are_one_pair(row):
    assert find_reader("auto", row) is READERS["trl"]
    assert read("trl", row) == ([user("One plus one?")], "Two.", "Three.")


def test_trl_keeps_a_system_message_that_stands_in_the_answers():
    system = {"role": "system", "content": "Be short."}
    row = {side: [system, *ULTRAFEEDBACK[side]] for side in ("chosen", "rejected")}
    assert read("trl", {"prompt": "One plus one?", **row})[0] == [system, user("One plus one?")]


def test_trl_conversation_about_another_prompt_is_refused():
    row = {"prompt": "What else?", "chosen": ULTRAFEEDBACK["chosen"], "rejected": ULTRAFEEDBACK["rejected"]}
    with pytest.raises(Refused, match="differs before"):
        read("trl", row)


def test_ultrafeedback_ties_are_refused():
    assert read("ultrafeedback", ULTRAFEEDBACK) == ([user("One plus one?")], "Two.", "Three.")
    with pytest.raises(Refused, match="tie"):
        read("ultrafeedback", ULTRAFEEDBACK | {"score_rejected": 8.5})


@pytest.mark.parametrize("number", [int, float, str])
def test_shp_label_says_which_side_is_preferred(number):
    prompt = [user("Why is bread brown?")]
    assert read("shp", SHP | {"labels": number(1)}) == (prompt, "Maillard.", "Paint.")
    assert read("shp", SHP | {"labels": number(0)}) == (prompt, "Paint.", "Maillard.")
    with pytest.raises(Refused, match="tie"):
        read("shp", SHP | {"score_B": number(30)})


def test_tldr_is_a_raw_prefix_that_asks_for_the_summary():
    text = "SUBREDDIT: r/aww\n\nTITLE: Cat\n\nPOST: My cat sat on the mat.\n\nTL;DR:"
    assert read("tldr", TLDR) == ([{"role": "text", "content": text}], " Cat sat.", " Dog ran.")
    with pytest.raises(Refused, match="empty prompt"):
        read("tldr", TLDR | {"info": {"article": "news"}})


def test_imdb_prefix_keeps_white_space():
    assert read("imdb_prefix", IMDB) == ([{"role": "text", "content": "This film is"}], " a joy.", " a bore.")


def test_meta_has_the_small_scalars_that_are_not_text_columns():
    row = TRL | {"id": 7, "domain": "maths", "score": float("nan"), "long": "x" * 201, "list": [1], "none": None}
    assert json.loads(meta_json(read_row(READERS["trl"], row).meta)) == {"id": 7, "domain": "maths"}


@pytest.mark.parametrize("name", [name for name in ROWS if name != "imdb_prefix"])
def test_auto_finds_the_reader_by_its_keys(name):
    assert find_reader("auto", ROWS[name]) is READERS[name]


def test_auto_asks_where_two_readers_fit():
    with pytest.raises(BadRow, match="fits the readers trl and shp"):
        find_reader("auto", TRL | SHP)
    with pytest.raises(BadRow, match="fits the readers hh and trl"):
        find_reader("auto", HH | {"prompt": "One plus one?"})


def test_auto_names_the_keys_it_found():
    with pytest.raises(BadRow, match="keys: instruction, output"):
        find_reader("auto", {"instruction": "a", "output": "b"})


def test_unknown_reader_has_a_nearest_name():
    with pytest.raises(BadInput, match="unknown reader 'ultrafedback'; did you mean 'ultrafeedback'"):
        find_reader("ultrafedback", TRL)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("trl", {"prompt": "a", "chosen": "b"}, "no key 'rejected' .*keys: prompt, chosen"),
        ("trl", TRL | {"chosen": 5}, "'chosen' is int, expected text or a list"),
        ("trl", {"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
        ("trl", TRL | {"chosen": ["a"]}, "message 1 of 'chosen' is str"),
        ("trl", TRL | {"chosen": [{"role": "human", "content": "a"}]}, "role 'human'"),
        ("trl", TRL | {"chosen": [{"role": "user", "content": None}]}, "content of message 1 of 'chosen' is NoneType"),
        ("hh", HH | {"rejected": None}, "'rejected' is NoneType, expected text"),
        ("shp", SHP | {"labels": 2}, "'labels' is 2, expected 0 or 1"),
        ("shp", SHP | {"labels": True}, "'labels' is True, expected a number"),
        ("tldr", TLDR | {"summaries": [{"text": "a"}]}, "list of two"),
        ("ultrafeedback", ULTRAFEEDBACK | {"score_chosen": "high"}, "'score_chosen' is 'high', expected a number"),
    ],
)
def test_rows_of_another_form_are_told_with_key_and_type(name, row, told):
    with pytest.raises(BadRow, match=told):
        read(name, row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def mutated_rows(draw):
    name = draw(st.sampled_from(sorted(ROWS)))
    row = copy.deepcopy(ROWS[name])
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(row))
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        holder = row
        for key in way:
            holder = holder[key]
        if draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = draw(JSON)
    return name, row


def outcome_of(reader, row):
    """What the row becomes; any exception but the two that readers may raise fails the test."""
    try:
        return read_row(find_reader(reader, row), row)
    except (Refused, BadRow) as told:
        return told


@settings(derandomize=True, max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_rows())
def test_any_row_is_read_refused_or_told_to_be_bad(case):
    name, row = case
    for reader in (name, "auto"):
        outcome = outcome_of(reader, row)
        if isinstance(outcome, RawPair):
            assert outcome.chosen.strip() != outcome.rejected.strip()
            json.loads(meta_json(outcome.meta))
        elif isinstance(outcome, Refused):
            assert outcome.reason in REASONS
        else:
            assert str(outcome)


def test_stack_exchange_pairs_the_best_answer_with_the_worst_without_mark_up():
    prompt = [user("Why is bread brown?")]
    assert read("stack_exchange", STACK_EXCHANGE) == (prompt, "Maillard.\n\nsugar\nheat", "Paint & varnish.")
    same = {**STACK_EXCHANGE, "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 1}]}
    with pytest.raises(Refused, match="tie"):
        read("stack_exchange", same)
    with pytest.raises(BadRow, match="answers"):
        read("stack_exchange", {**STACK_EXCHANGE, "answers": ["a"]})


def test_whole_reviews_are_cut_to_what_follows_their_beginning():
    """The public IMDB pairs repeat the beginning in both answers; white space is kept."""
    row = {"text": "This film is", "chosen": "This film is a joy.", "rejected": "This film is a bore. This film is"}
    assert read("imdb_prefix", row) == (
        [{"role": "text", "content": "This film is"}],
        " a joy.",
        " a bore. This film is",
    )
    assert read("imdb_prefix", {**IMDB, "chosen": "This film is odd."})[1] == "This film is odd."


def test_public_ultrafeedback_pairs_are_read_whole():
    """The ArmoRM pairs have a text prompt, whole conversations and columns that are no part of a pair."""
    row = {
        **{key: ULTRAFEEDBACK[key] for key in ("prompt", "chosen", "rejected")},
        "prompt_id": "a",
        "all_rm_scores": [0.1],
    }
    assert find_reader("auto", row) is READERS["trl"]
    assert read("trl", row) == ([user("One plus one?")], "Two.", "Three.")

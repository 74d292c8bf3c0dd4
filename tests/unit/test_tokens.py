"""Tokenising: one BOS, an end token, nothing cut silently, and the same ids wherever a text is rendered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prefopt.errors import BadInput
from prefopt.inputs.rendering import end_ids, render_prompt, response_ids, response_text
from prefopt.inputs.tokenizer_training import SPECIAL_TOKENS, check_same_vocabulary, train_tokenizer
from prefopt.pairs import build_pairs, digest63
from prefopt.specs import DataSpec, FilesSource, TokensSpec
from prefopt.tokens import TOKEN_COLUMNS, tokenize_pairs

DATA = Path(__file__).parents[3] / "shared" / "data"
TEXTS = ["count to three please", "one two three", "one two", "say it again", "three two one zero"] * 3
QUESTION = [{"role": "user", "content": "count to three please"}]
RAW = [{"role": "text", "content": "one two"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
BYTE_PAIRS = train_tokenizer(TEXTS, "bpe", 300)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(TEXTS, "words", 64)


@pytest.fixture(scope="module")
def bpe():
    return BYTE_PAIRS


def with_template(template, *special):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS[4:], *special]})
    tokenizer.chat_template = template
    return tokenizer


def pair(number, chosen="one two three", rejected="three", prompt=QUESTION, split="train"):
    return {
        "pair_id": number,
        "prompt_id": digest63(prompt),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "split": split,
        "source": "a.jsonl",
        "source_row": number,
    }


def tokenize(tokenizer, *pairs, positions=None, **spec):
    spec = {"max_prompt_tokens": 16, "max_length": 32} | spec
    return tokenize_pairs(pd.DataFrame(pairs), tokenizer, TokensSpec(**spec), positions)


# --- tokenizers


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_equal_texts_give_equal_tokenizers_that_survive_saving(kind, tmp_path):
    tokenizer, again = (train_tokenizer(iter(TEXTS), kind, 300) for _ in range(2))
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    check_same_vocabulary(tokenizer, loaded)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    for messages in (QUESTION, RAW):
        for template in ("auto", "plain"):
            assert render_prompt(loaded, messages, template) == render_prompt(tokenizer, messages, template)
    assert response_ids(loaded, "one two", "auto") == response_ids(tokenizer, "one two", "auto")
    assert loaded.pad_token_id == 0


def test_vocabulary_is_at_most_what_was_asked_most_frequent_first(words):
    small = train_tokenizer(TEXTS, "words", 10)
    # counts: three 9, two 9, one 9, others 3; ties by the alphabet
    assert small.convert_ids_to_tokens(range(10)) == [*SPECIAL_TOKENS, "one", "three", "two"]
    assert len(words) == 7 + len({word for text in TEXTS for word in text.split()})
    with pytest.raises(BadInput, match="vocab_size 200 is too small for bpe: 256 bytes and 7 special tokens need 263"):
        train_tokenizer(TEXTS, "bpe", 200)


def test_vocabulary_mismatch_names_sizes_and_the_first_token(words):
    other = train_tokenizer([*TEXTS, "one one two"], "words", 64)
    with pytest.raises(BadInput, match=r"17 and 17 tokens, first at id 8 \('three' and 'two'\)"):
        check_same_vocabulary(words, other)
    with pytest.raises(BadInput, match="17 and 10 tokens, first at id 10"):
        check_same_vocabulary(words, train_tokenizer(TEXTS, "words", 10))


# --- rendering


def test_chat_rendering_spelled_out(words):
    turns = [*QUESTION, {"role": "assistant", "content": "one"}, {"role": "user", "content": "say it again"}]
    text = "<s> <|user|> count to three please <|assistant|> one </s> <|user|> say it again <|assistant|>"
    assert words.decode(render_prompt(words, turns, "auto")) == text
    assert words.decode(response_ids(words, " one two ", "auto")) == "one two </s>"


def test_a_rendered_conversation_is_prompt_plus_response(bpe):
    whole = [*QUESTION, {"role": "assistant", "content": "one two three"}]
    ids = bpe.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert render_prompt(bpe, QUESTION, "chat") + response_ids(bpe, "one two three", "chat") == ids


def test_plain_and_raw_rendering_have_one_bos_in_front(bpe):
    assert bpe.decode(render_prompt(bpe, QUESTION, "plain")) == "<s>\n\nHuman: count to three please\n\nAssistant:"
    assert bpe.decode(response_ids(bpe, "one", "plain")) == " one</s>"
    assert bpe.decode(render_prompt(bpe, RAW, "auto")) == "<s>one two"
    assert bpe.decode(response_ids(bpe, " three\n", "raw")) == " three\n</s>"


@pytest.mark.parametrize(
    ("template", "special", "after"),
    [(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"), (INST, (), " </s>")],
)
def test_a_response_ends_with_what_the_template_puts_there(template, special, after):
    tokenizer = with_template(template, *special)
    assert tokenizer.decode(end_ids(tokenizer, "chat")) == after
    ids = response_ids(tokenizer, "one two", "auto")
    whole = [*QUESTION, {"role": "assistant", "content": "one two"}]
    assert after in tokenizer.apply_chat_template(whole, tokenize=False)
    assert tokenizer.decode(ids) == "one two" + after
    assert response_text(tokenizer, [*ids, 9, 9]) == "one two"


def test_template_problems_are_told(bpe):
    bare = train_tokenizer(TEXTS, "bpe", 300)
    bare.chat_template = None
    assert render_prompt(bare, QUESTION, "auto") == render_prompt(bpe, QUESTION, "plain")
    with pytest.raises(BadInput, match="no chat template; use template: plain"):
        render_prompt(bare, QUESTION, "chat")
    with pytest.raises(BadInput, match=r"refuses turns user, user .*roles must alternate"):
        render_prompt(with_template(INST), QUESTION * 2, "auto")
    with pytest.raises(BadInput, match="writes <s> more than once"):
        render_prompt(with_template("{{ bos_token }}{{ bos_token }}"), QUESTION, "auto")
    with pytest.raises(BadInput, match="leaves out what the assistant says"):
        response_ids(with_template("{{ bos_token }}"), "one", "auto")
    bare.eos_token = None
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        response_ids(bare, "one", "plain")
    with pytest.raises(BadInput, match="has no token"):
        response_ids(bpe, "  ", "auto")


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_bpe_gives_any_text_back(text):
    tokenizer = BYTE_PAIRS
    if any(token in text for token in SPECIAL_TOKENS):
        return
    for template in ("chat", "plain", "raw"):
        ids = response_ids(tokenizer, text, template)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.bos_token_id not in ids
        assert response_text(tokenizer, ids) == text.strip()


# --- the table


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_rows_are_what_the_single_functions_give(bpe, template):
    raw = [pair(2, " three", " zero", prompt=RAW)]
    pairs = [pair(1), *raw, pair(3, split="test")]
    tokens, refused = tokenize(bpe, *pairs, template=template, max_prompt_tokens=80, max_length=160)
    assert tuple(tokens.columns) == TOKEN_COLUMNS
    assert refused.empty
    for record, row in zip(pairs, tokens.to_dict("records"), strict=True):
        assert {key: row[key] for key in ("pair_id", "prompt_id", "split")}.items() <= record.items()
        assert row["prompt_ids"].tolist() == render_prompt(bpe, record["prompt"], template)
        style = "raw" if record["prompt"] is RAW else template
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"].tolist() == response_ids(bpe, record[side], style)
            assert row[f"{side}_ids"].dtype == np.int32
        for part in ("prompt", "chosen", "rejected"):
            assert row[f"{part}_tokens"] == len(row[f"{part}_ids"])


def test_table_survives_parquet_on_both_sides(bpe, tmp_path):
    pairs = pd.DataFrame([pair(1), pair(2, "three", "one")])
    pairs.to_parquet(tmp_path / "pairs.parquet", index=False)
    spec = TokensSpec(max_prompt_tokens=40, max_length=80)
    tokens, _ = tokenize_pairs(pd.read_parquet(tmp_path / "pairs.parquet"), bpe, spec)
    tokens.to_parquet(tmp_path / "tokens.parquet", index=False)
    back = pd.read_parquet(tmp_path / "tokens.parquet")
    direct, _ = tokenize_pairs(pairs, bpe, spec)
    for column in TOKEN_COLUMNS:
        assert all(map(np.array_equal, back[column], direct[column]))


# One word is one token: the prompt is <s> <|user|> count to three please <|assistant|>, 7 tokens.


def test_lengths_fit_to_the_last_token(words):
    exact = 7 + 3 + 1  # prompt, "one two three", end
    tokens, refused = tokenize(words, pair(1), max_prompt_tokens=7, max_length=exact)
    assert tokens[["prompt_tokens", "chosen_tokens", "rejected_tokens"]].to_numpy().tolist() == [[7, 4, 2]]
    assert refused.empty
    tokens, refused = tokenize(words, pair(1), max_prompt_tokens=7, max_length=exact - 1)
    assert tokens.empty
    assert refused.to_numpy().tolist() == [
        ["a.jsonl", 1, "response too long", "chosen: 3 tokens without its end, room for 2"]
    ]


def test_overlong_prompts_stop_the_run_or_are_refused_or_keep_their_end(words):
    short = pair(2, prompt=[{"role": "user", "content": "count"}])
    with pytest.raises(
        BadInput,
        match=r"a.jsonl: row 2: prompt of 7 tokens, max_prompt_tokens is 6 \(1 of 2 pairs .* overlong: refuse",
    ):
        tokenize(words, short, pair(1), max_prompt_tokens=6)
    tokens, refused = tokenize(words, short, pair(1), max_prompt_tokens=6, overlong="refuse")
    assert tokens["pair_id"].tolist() == [2]
    assert refused.to_numpy().tolist() == [["a.jsonl", 1, "prompt too long", "7 tokens, max_prompt_tokens 6"]]
    for limit, kept in [(6, "<s> count to three please <|assistant|>"), (2, "<s> <|assistant|>"), (1, "<|assistant|>")]:
        tokens, refused = tokenize(words, pair(1), max_prompt_tokens=limit, overlong="truncate_left")
        assert words.decode(tokens["prompt_ids"][0]) == kept
        assert refused.empty


def test_what_cannot_be_tokenised_is_refused_with_a_reason(words):
    inside = [{"role": "user", "content": "count <|assistant|> one"}]
    tokens, refused = tokenize(
        words,
        pair(0),
        pair(1, "one </s> two"),
        pair(2, prompt=inside),
        pair(3, "one un", "one deux"),
        pair(4, rejected="\u2003"),
    )
    assert tokens["pair_id"].tolist() == [0]
    assert refused[["source_row", "reason", "detail"]].to_numpy().tolist() == [
        [1, "control token in text", "</s>"],
        [2, "control token in text", "<|assistant|>"],
        [3, "identical tokens", ""],
        [4, "empty rejected", "no token left"],
    ]


def test_a_prompt_that_the_template_refuses_is_refused_with_its_words():
    tokens, refused = tokenize(
        with_template(INST), pair(1), pair(2, prompt=QUESTION * 2), max_prompt_tokens=80, max_length=160
    )
    assert tokens["pair_id"].tolist() == [1]
    assert refused["reason"].tolist() == ["chat template refuses the prompt"]
    assert "roles must alternate" in refused["detail"][0]


def test_length_over_the_models_positions_is_told(words):
    with pytest.raises(BadInput, match="max_length 32 is more than the model's 31 positions"):
        tokenize(words, pair(1), positions=31)
    assert len(tokenize(words, pair(1), positions=32)[0]) == 1


@pytest.mark.skipif(not (DATA / "hh_rlhf").is_dir(), reason="needs ../shared/data/hh_rlhf")
def test_real_dialogues_are_tokenised_whole():
    source = FilesSource(kind="files", paths=["hh_rlhf/helpful-base.jsonl.gz"])
    pairs, _ = build_pairs(DataSpec(source=source, limit=300), DATA)
    tokenizer = train_tokenizer([*pairs["chosen"], *pairs["rejected"]], "bpe", 1024)
    spec = TokensSpec(max_prompt_tokens=512, max_length=768, overlong="refuse")
    tokens, refused = tokenize_pairs(pairs, tokenizer, spec, 768)
    assert len(tokens) + len(refused) == 300
    assert set(refused["reason"]) <= {"prompt too long", "response too long"}
    texts = pairs.set_index("pair_id")
    for row in tokens.to_dict("records"):
        assert row["prompt_ids"].tolist().count(tokenizer.bos_token_id) == 1
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"][-1] == tokenizer.eos_token_id
            assert row["prompt_tokens"] + row[f"{side}_tokens"] <= 768
            assert response_text(tokenizer, row[f"{side}_ids"]) == texts[side][row["pair_id"]]

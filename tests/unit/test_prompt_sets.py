"""Prompt sets: what is read, what is refused and with which words, and the artifact that answers are drawn from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from prefopt.artifacts import Node
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.inputs.prompt_sets import read_prompts
from prefopt.inputs.rendering import render_prompt
from prefopt.inputs.sources import prompts_identity
from prefopt.inputs.tokenizer_training import BOS, train_tokenizer
from prefopt.models import load_tokenizer, save_model
from prefopt.pairs import digest63
from prefopt.specs import AlpacaEvalPrompts, FilePrompts, TokensSpec
from prefopt.stages import STAGES, RunOptions
from prefopt.stages.tables import prompt_origins, prompt_rows, prompt_texts
from prefopt.store.builds import Build
from tiny import causal_lm

ROWS = [
    {"instruction": "Name a river.", "output": "The Elbe.", "generator": "someone", "dataset": "places"},
    {"instruction": " Name a\ncity. ", "output": "", "generator": "someone"},
    {"instruction": "Name a lake.", "output": "Lake Zürich.", "generator": "someone", "dataset": "places"},
]


def write(folder: Path, rows: object, name: str = "asked.json") -> Path:
    path = folder / name
    text = json.dumps(rows) if ".jsonl" not in name else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(path: Path, **settings):
    spec, execution, _ = prompts_identity(FilePrompts(kind="file", path=str(path), **settings), Path())
    return read_prompts(spec, Path(execution["path"]))


@pytest.mark.parametrize("name", ["asked.json", "asked.json.gz", "asked.jsonl", "asked.jsonl.gz"])
def test_rows_keep_their_order_their_number_and_every_character(tmp_path, name):
    found = read(write(tmp_path, ROWS, name))
    table = found.table
    assert [message["content"] for (message,) in table["prompt"]] == [row["instruction"] for row in ROWS]
    assert table["index"].tolist() == [0, 1, 2]
    assert table["output"].tolist() == [row["output"] for row in ROWS]
    assert table["dataset"].tolist() == ["places", "", "places"]
    assert (found.generator, found.repeated, found.refused) == ("someone", 0, {})
    assert table["prompt_id"][0] == digest63([{"role": "user", "content": "Name a river."}])


def test_a_csv_table_another_column_and_a_reader_of_pairs(tmp_path):
    (tmp_path / "a.csv").write_text("question,rest\nWhy?,x\nHow?,y\n")
    assert [m["content"] for (m,) in read(tmp_path / "a.csv", column="question").table["prompt"]] == ["Why?", "How?"]
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    pairs = [{"chosen": turns + "d", "rejected": turns + word} for word in ("e", "f", "d")]
    found = read(write(tmp_path, pairs, "hh.jsonl"), reader="hh")
    (prompt,) = found.table["prompt"]
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    assert (found.repeated, found.refused) == (1, {"identical pair": 1})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "x"}], "row 1: 'instruction' is not there (the row has the keys: prompt)"),
        ([ROWS[0], {"instruction": " "}], "row 2: 'instruction' is no text"),
        ([ROWS[0], {**ROWS[0], "output": "The Rhine."}], "row 2: the same prompt as row 1, with another output"),
        ([ROWS[0], {**ROWS[2], "generator": "else"}], "row 2: an output of 'else', those before are of 'someone'"),
        ([{**ROWS[0], "output": 7}], "row 1: 'output' is int, expected text"),
        ([{**ROWS[0], "index": "third"}], "row 1: 'index' is 'third', expected a whole number"),
        (["x"], "row 1: str where an object with keys is expected"),
        ({"instruction": "x"}, "dict, expected a list of objects"),
        ([], "no usable prompt: it has no rows"),
    ],
)
def test_what_is_no_prompt_is_told_with_file_and_row(tmp_path, rows, expected):
    path = write(tmp_path, rows)
    with pytest.raises(BadInput) as error:
        read(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_changes_after_planning_is_told(tmp_path):
    path = write(tmp_path, ROWS)
    spec, execution, _ = prompts_identity(FilePrompts(kind="file", path=str(path)), Path())
    write(tmp_path, ROWS[:2])
    with pytest.raises(BadInput, match=r"sha256 is .* planned was"):
        read_prompts(spec, Path(execution["path"]))


def test_alpaca_eval_is_a_pinned_file_of_the_hub_or_a_local_one(tmp_path):
    spec, execution, name = prompts_identity(AlpacaEvalPrompts(kind="alpaca_eval"), Path())
    assert (spec["repo"], spec["file"]) == ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
    assert (len(spec["revision"]), execution, name) == (40, {}, "alpaca-eval")
    with pytest.raises(BadInput, match=r"none of alpaca_eval_gpt4_baseline\.json, .* in this folder"):
        prompts_identity(AlpacaEvalPrompts(kind="alpaca_eval", path="."), tmp_path)
    write(tmp_path, ROWS, "eval_set.json.gz")
    local = prompts_identity(AlpacaEvalPrompts(kind="alpaca_eval", path="."), tmp_path)
    plain = prompts_identity(FilePrompts(kind="file", path="eval_set.json.gz"), tmp_path)
    assert local == plain  # the same prompts, whatever they are called


# --- the artifact ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A results folder with a model whose tokenizer has a chat template that writes BOS."""
    results = tmp_path_factory.mktemp("results")
    tokenizer = train_tokenizer([row["instruction"] for row in ROWS], "bpe", 400)
    model = causal_lm()
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, results / "base" / "weights")
    return results


def prepared(results: Path, path: Path, out: Path, *, outputs: bool = True, limit: int = 200) -> Build:
    source, execution, _ = prompts_identity(FilePrompts(kind="file", path=str(path)), Path())
    tokens = TokensSpec(max_prompt_tokens=limit, max_length=limit + 200, overlong="refuse").model_dump()
    spec = {"source": source, "tokens": tokens, "outputs": outputs}
    node = Node(
        stage="prompts", version=1, name="asked", spec=spec, parents={"base": "base"}, execution=dict(execution)
    )
    out.mkdir(exist_ok=True)
    build = Build(node=node, results=results, work=out, scratch=out)
    STAGES["prepare-prompts"].load()(build, RunOptions())
    return build


def test_templates_are_applied_once_and_recorded(base, tmp_path):
    build = prepared(base, write(tmp_path, ROWS), tmp_path / "out")
    tokenizer = load_tokenizer(base / "base" / "weights")
    rows = prompt_rows(build.work, "test", None)
    texts = dict(zip(rows["prompt_id"], prompt_texts(build.work, rows["prompt_id"]), strict=True))
    for prompt_id, ids in zip(rows["prompt_id"], rows["prompt_ids"], strict=True):
        spelled = tokenizer.decode(ids)
        for mark in (BOS, "<|user|>", "<|assistant|>"):  # a second rendering would write each of them again
            assert spelled.count(mark) == 1, mark
        assert ids == render_prompt(tokenizer, [{"role": "user", "content": texts[prompt_id]}], "auto")
    assert build.summary["prompts_by_style"] == {"chat": 3}
    assert len(build.summary["chat_template_sha256"]) == 64


def test_another_chat_template_is_another_digest(base, tmp_path):
    first = prepared(base, write(tmp_path, ROWS), tmp_path / "out").summary["chat_template_sha256"]
    other = tmp_path / "results"
    tokenizer = load_tokenizer(base / "base" / "weights")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|> ")
    tokenizer.save_pretrained(other / "base" / "weights")
    assert prepared(other, tmp_path / "asked.json", tmp_path / "out2").summary["chat_template_sha256"] != first


def test_a_baselines_outputs_stand_as_answers_of_a_model(base, tmp_path):
    build = prepared(base, write(tmp_path, ROWS), tmp_path / "out")
    records = read_json(build.work / "outputs.json")
    assert [record["output"] for record in records] == [row["output"] for row in ROWS]
    assert {record["generator"] for record in records} == {"someone"}
    responses = pd.read_parquet(build.work / "responses.parquet")
    assert responses["prompt_id"].tolist() == [record["prompt_id"] for record in records]
    assert responses["tokens"].tolist()[1] == 1, "an empty answer is its end alone"
    assert prompt_origins(build.work, responses["prompt_id"])[:2] == [{"index": 0, "dataset": "places"}, {"index": 1}]


def test_missing_outputs_and_prompts_without_room_are_told(base, tmp_path):
    rows = [ROWS[0], {"instruction": "Name a lake."}]
    with pytest.raises(BadInput, match=r"row 2 has no 'output' \(1 of 2 rows have none\)"):
        prepared(base, write(tmp_path, rows), tmp_path / "out")
    long = [*ROWS, {"instruction": "Name " * 200}, {"instruction": f"Say {BOS} twice."}]
    build = prepared(base, write(tmp_path, long), tmp_path / "out", outputs=False)
    assert build.summary["refused"] == {"prompt too long": 1, "control token in text": 1}
    assert build.summary["prompts"] == 3
    with pytest.raises(BadInput, match="all 3 prompts were refused"):
        prepared(base, write(tmp_path, ROWS), tmp_path / "out", limit=2)


def test_all_of_alpaca_evals_prompts_are_read_with_the_baselines_outputs(shared_data, base, tmp_path):
    folder = shared_data / "alpaca_eval"
    if not (folder / "eval_set.json.gz").is_file():
        pytest.skip("needs shared/data/alpaca_eval/eval_set.json.gz")
    spec, execution, _ = prompts_identity(AlpacaEvalPrompts(kind="alpaca_eval", path="alpaca_eval"), shared_data)
    found = read_prompts(spec, Path(execution["path"]))
    assert (len(found.table), found.generator, found.repeated) == (805, "gpt4_1106_preview", 0)
    assert found.table["index"].tolist() == list(range(805))
    build = prepared(base, folder / "eval_set.json.gz", tmp_path / "out", limit=8000)
    assert build.summary["prompts"] == 805
    assert build.summary["refused"] == {}

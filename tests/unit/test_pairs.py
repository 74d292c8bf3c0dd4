"""The pair table: identities, splits, files as users have them, and what is said about broken ones."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.errors import BadInput
from prefopt.pairs import PAIR_COLUMNS, REFUSED_COLUMNS, build_pairs, digest63, read_source, split_of, summarise
from prefopt.specs import DataSpec, FilesSource, HubSource, SplitSpec, WorldSource

DATA = Path(__file__).parents[3] / "shared" / "data"
SPLITS = SplitSpec(train=0.5, judge=0.25, validation=0.1, test=0.15)


def row(number, answer=0):
    return {"prompt": f"Count to {number}.", "chosen": f"{number}!", "rejected": f"no {answer}", "nr": number}


ROWS = [row(number) for number in range(60)]


def files(*paths, **keys):
    return FilesSource(kind="files", paths=[str(path) for path in paths], **keys)


def write_jsonl(path, rows):
    text = "".join(json.dumps(value) + "\n" for value in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_pair_and_prompt_ids_are_the_first_63_bits_of_sha256(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(3)])
    (record,), refused = read_source(files("a.jsonl"), tmp_path)
    prompt = '[{"content":"Count to 3.","role":"user"}]'
    assert record["prompt_id"] == int(hashlib.sha256(prompt.encode()).hexdigest()[:16], 16) // 2
    whole = f'[{prompt},"3!","no 0"]'
    assert record["pair_id"] == int(hashlib.sha256(whole.encode()).hexdigest()[:16], 16) // 2
    assert record["meta"] == '{"nr": 3}'
    assert refused == []


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 99))
def test_digests_fit_a_signed_64_bit_column_and_seeds_are_not_mixed_up_with_them(text, seed):
    assert 0 <= digest63(text) < 2**63
    assert split_of(digest63(text), SplitSpec(train=0.5, judge=0.5 - 1e-9, test=1e-9), seed) in ("train", "judge")


def test_shares_are_kept_within_four_standard_errors():
    n = 4000
    drawn = [split_of(digest63(number), SPLITS, 7) for number in range(n)]
    for split, share in SPLITS.model_dump().items():
        error = (share * (1 - share) / n) ** 0.5
        assert abs(drawn.count(split) / n - share) < 4 * error
    other = [split_of(digest63(number), SPLITS, 8) for number in range(n)]
    same = sum(a == b for a, b in zip(drawn, other, strict=True)) / n
    independent = 0.5**2 + 0.25**2 + 0.1**2 + 0.15**2
    assert abs(same - independent) < 4 * (independent * (1 - independent) / n) ** 0.5


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 1000), st.floats(0.1, 0.8), st.floats(0.0, 0.1))
def test_a_larger_train_share_only_adds_to_train(prompt_id, seed, train, more):
    before = split_of(prompt_id, SplitSpec(train=train, test=1 - train), seed)
    after = split_of(prompt_id, SplitSpec(train=train + more, test=1 - train - more), seed)
    assert (before, after) != ("train", "test")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 1000), st.floats(0.1, 0.5), st.floats(0.0, 0.2), st.floats(0.01, 0.2))
def test_validation_prompts_come_out_of_test_alone(prompt_id, seed, train, judge, validation):
    rest = 1 - train - judge
    before = split_of(prompt_id, SplitSpec(train=train, judge=judge, test=rest), seed)
    parts = SplitSpec(train=train, judge=judge, validation=validation, test=rest - validation)
    after = split_of(prompt_id, parts, seed)
    assert after == before or (before, after) == ("test", "validation")


@settings(derandomize=True, max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(60)), kept=st.integers(40, 60), seed=st.integers(0, 5))
def test_a_prompt_is_in_one_split_whatever_else_is_in_the_file(tmp_path, order, kept, seed):
    some = [row(number, answer) for number in order[:kept] for answer in range(2)]
    write_jsonl(tmp_path / "a.jsonl", some)
    pairs, _ = build_pairs(DataSpec(source=files("a.jsonl"), splits=SPLITS, split_seed=seed), tmp_path)
    assert (pairs.groupby("prompt_id")["split"].nunique() == 1).all()
    assert pairs["split"].tolist() == [split_of(number, SPLITS, seed) for number in pairs["prompt_id"]]


def test_duplicates_are_refused_across_files_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])
    write_jsonl(tmp_path / "b.jsonl", [ROWS[5], row(1000)])
    pairs, refused = build_pairs(DataSpec(source=files("a.jsonl", "b.jsonl")), tmp_path)
    assert len(pairs) == 61
    assert pairs["pair_id"].is_unique
    assert tuple(pairs.columns) == PAIR_COLUMNS
    assert tuple(refused.columns) == REFUSED_COLUMNS
    assert refused[["source", "source_row", "reason"]].to_numpy().tolist() == [
        ["a.jsonl", 60, "duplicate pair"],
        ["b.jsonl", 0, "duplicate pair"],
    ]
    summary = summarise(pairs, refused)
    assert summary["refused"] == {"duplicate pair": 2}
    assert summary["sources"]["b.jsonl"] == {"pairs": 1, "refused": {"duplicate pair": 1}}
    assert sum(split["pairs"] for split in summary["splits"].values()) == summary["pairs"] == 61
    json.dumps(summary)


def test_limit_counts_accepted_pairs_of_each_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0] | {"chosen": ""}, *ROWS])
    write_jsonl(tmp_path / "b.jsonl.gz", [row(number) for number in range(100, 160)])
    records, refused = read_source(files("a.jsonl", "b.jsonl.gz"), tmp_path, limit=3)
    assert [record["source_row"] for record in records] == [1, 2, 3, 0, 1, 2]
    assert [record["reason"] for record in refused] == ["empty chosen"]


def test_one_table_in_every_container(tmp_path):
    import datasets

    frame = pd.DataFrame(ROWS)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl.gz", ROWS)
    frame.to_parquet(tmp_path / "c.parquet")
    frame.drop(columns="nr").to_csv(tmp_path / "d.csv", index=False)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "e")
    (tmp_path / "f").mkdir()
    frame.to_parquet(tmp_path / "f" / "part-0.parquet")
    want = [digest63([[{"role": "user", "content": r["prompt"]}], r["chosen"], r["rejected"]]) for r in ROWS]
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv", "e", "f"):
        records, _ = read_source(files(name), tmp_path)
        assert [record["pair_id"] for record in records] == want, name
        assert [record["source_row"] for record in records] == list(range(60)), name


def test_message_lists_come_back_from_parquet_as_they_went_in(tmp_path):
    messages = [
        {"chosen": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(60)
    ]
    for item in messages:
        item["rejected"] = [item["chosen"][0], {"role": "assistant", "content": "no"}]
    pd.DataFrame(messages).to_parquet(tmp_path / "a.parquet")
    pairs, _ = build_pairs(DataSpec(source=files("a.parquet")), tmp_path)
    pairs.to_parquet(tmp_path / "pairs.parquet", index=False)
    back = pd.read_parquet(tmp_path / "pairs.parquet")
    assert [list(prompt) for prompt in back["prompt"]] == pairs["prompt"].tolist()
    assert [digest63(list(prompt)) for prompt in back["prompt"]] == pairs["prompt_id"].tolist()


def test_source_names_are_relative_to_the_folder_that_the_files_share(tmp_path):
    for folder in ("here", "there/deep"):
        for part in ("harmless", "helpful"):
            (tmp_path / folder / part).mkdir(parents=True)
            write_jsonl(tmp_path / folder / part / "train.jsonl", [row(len(part))])
    parts = ("harmless/train.jsonl", "helpful/train.jsonl")
    relative = read_source(files(*parts), tmp_path / "here")
    absolute = read_source(files(*(tmp_path / "there" / "deep" / part for part in parts)), Path("elsewhere"))
    assert relative == absolute
    assert [record["source"] for record in relative[0]] == list(parts)
    alone, _ = read_source(files(parts[0]), tmp_path / "here")
    assert alone[0]["source"] == "train.jsonl"


def outcome_of(call):
    """What a call returns, or the BadInput it raises; any other exception fails the test."""
    try:
        return call()
    except BadInput as error:
        return error


BAD_FILES = {
    "not JSON": (
        "a.jsonl",
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n',
        r"a.jsonl: line 2: not JSON",
    ),
    "array": ("a.jsonl", b"[1]\n", r"a.jsonl: line 1: list where an object"),
    "no rejected": (
        "a.jsonl",
        b'\n\n{"prompt": "a", "chosen": "b"}\n',
        r"line 3: fits no reader .*keys: prompt, chosen",
    ),
    "type": ("a.jsonl", b'{"prompt": "a", "chosen": 5, "rejected": "b"}', r"line 1: 'chosen' is int"),
    "latin-1": ("a.jsonl", '{"prompt": "\u00e9"}'.encode("latin-1"), r"line 1: byte 0xe9 is not UTF-8"),
    "utf-16": ("a.csv", "prompt,chosen,rejected\n".encode("utf-16"), r"line 1: byte 0xff is not UTF-8"),
    "empty": ("a.jsonl", b"", r"a.jsonl: no usable pair: it has no rows"),
    "all refused": (
        "a.jsonl",
        b'{"prompt": "a", "chosen": "", "rejected": "b"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2,
        r"no usable pair \(empty chosen: 2, identical pair: 2\)",
    ),
    "suffix": ("a.json", b"[]", r"a.json: unsupported kind of file '.json'; supported: .jsonl"),
    "gzip": ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"a.jsonl.gz: .*"),
    "parquet": ("a.parquet", b"PAR1", r"a.parquet: not a readable parquet file"),
    "csv fields": (
        "a.csv",
        b'prompt,chosen,rejected\n"a\nb",c,d\n"e\ne",f\n',
        r"a.csv: line 4: 2 fields, the header has 3",
    ),
    "csv columns": ("a.csv", b"prompt,prompt\n", r"a.csv: line 1: column 'prompt' stands twice"),
    "csv quote": ("a.csv", b'prompt,chosen,rejected\n"a"b,c,d\n', r"a.csv: line 2: not CSV"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_told_in_one_line_with_file_and_place(tmp_path, case):
    name, content, told = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=told) as error:
        read_source(files(name), tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_file_has_a_nearest_name(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(BadInput, match=r"pears.jsonl: no such file or folder; did you mean 'pairs.jsonl'"):
        read_source(files("pears.jsonl"), tmp_path)


def test_a_saved_data_set_with_splits_asks_for_one(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(BadInput, match="splits train; give the path of one"):
        read_source(files("d"), tmp_path)
    assert len(read_source(files("d/train"), tmp_path)[0]) == 60


def test_pinned_content_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read_source(files("a.jsonl", sha256=[digest]), tmp_path)[0]) == 60
    with pytest.raises(BadInput, match=f"sha256 is {digest}, pinned is 00"):
        read_source(files("a.jsonl", sha256=["0" * 64]), tmp_path)
    with pytest.raises(BadInput, match="1 sha256 for 2 paths"):
        read_source(files("a.jsonl", "a.jsonl", sha256=[digest]), tmp_path)


def test_a_split_without_a_pair_is_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(BadInput, match=r"split '(train|test)' .* got no pair out of 1 with 1 prompts"):
        build_pairs(DataSpec(source=files("a.jsonl")), tmp_path)


def test_a_hub_data_set_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = HubSource(kind="hub", repo="nobody/nothing", revision="0" * 40)
    with pytest.raises(BadInput, match="nobody/nothing at 00000000, split 'train': cannot be loaded") as error:
        read_source(source, Path())
    assert "\n" not in str(error.value)


def test_world_pairs_carry_their_truth_as_meta():
    pairs, refused = build_pairs(DataSpec(source=WorldSource(kind="world", prompts=80, pairs=100)), Path())
    assert len(pairs) + len(refused) == 100
    assert set(refused["reason"]) <= {"duplicate pair"}
    assert {"kind", "phi", "domain"} <= set(json.loads(pairs["meta"][0]))
    assert pairs["prompt"][0][0]["role"] == "user"


@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"]))
def test_damaged_bytes_are_read_or_told(tmp_path, data, name):
    path = tmp_path / name
    if ".csv" in name:
        pd.DataFrame(ROWS[:5]).to_csv(path, index=False)
    else:
        write_jsonl(path, ROWS[:5])
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    told = outcome_of(lambda: read_source(files(name), tmp_path))
    assert isinstance(told, tuple) or name in str(told)


@pytest.mark.skipif(not (DATA / "hh_rlhf").is_dir(), reason="needs ../shared/data/hh_rlhf")
def test_hh_rlhf_counts_are_those_of_its_readme():
    # "29 pairs here are identical on both sides and 7 have an empty last turn", 1851 + 1901 + 902 + 2197 rows
    pairs, refused = build_pairs(DataSpec(source=files("hh_rlhf")), DATA)
    assert len(pairs) + len(refused) == 1851 + 1901 + 902 + 2197
    counts = summarise(pairs, refused)["refused"]
    assert counts["identical pair"] == 29
    assert counts["empty chosen"] + counts["empty rejected"] == 7
    assert set(counts) <= {
        "identical pair",
        "empty chosen",
        "empty rejected",
        "differs before the last turn",
        "no assistant turn at the end",
    }
    with gzip.open(DATA / "hh_rlhf" / "harmless-base.jsonl.gz") as stream:
        first = json.loads(stream.readline())
    turns = "".join(
        f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in pairs["prompt"][0]
    )
    assert f"{turns}\n\nAssistant: {pairs['chosen'][0]}" == first["chosen"].rstrip()


@pytest.mark.skipif(not (DATA / "hhh_alignment").is_dir(), reason="needs ../shared/data/hhh_alignment")
def test_hhh_alignment_reads_as_prompt_chosen_rejected():
    records, refused = read_source(files("hhh_alignment/hhh_alignment_221.jsonl.gz"), DATA)
    assert (len(records), len(refused)) == (221, 0)

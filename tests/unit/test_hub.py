"""Models and data sets of a hub on loopback: the pinned commit, whole and unharmed, once; then without network."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pandas as pd
import pytest
import torch
from huggingface_hub import constants

import fake_hub
import tiny
from artifact_builds import run_stage
from prefopt.artifacts import Node, tree_files
from prefopt.digests import file_sha256
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.inputs.hub import model_snapshot
from prefopt.models import load_causal_lm, save_model
from prefopt.stages.weights import weights_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny.causal_lm(), tiny.tokenizer(), folder)
    return fake_hub.files_of(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and this process as one that was started with HF_ENDPOINT and HF_HOME set to it and an empty folder."""
    with fake_hub.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield hub


def prepare(results, repo, commit, **more):
    spec = {"kind": "hub", "repo": repo, "revision": commit, "trust_remote_code": False} | more
    return run_stage(results, "prepare-model", spec, [])


def test_the_pinned_commit_is_what_is_downloaded_once_and_only_the_files_that_are_needed(hub, files, tmp_path):
    more = {"pytorch_model.bin": b"pickled", "onnx/model.safetensors": b"x", "flax_model.msgpack": b"x"}
    pinned = hub.add("someone/tiny", files | more)
    newer = hub.add("someone/tiny", files | {"model.safetensors": b"x" * 10_000})
    build = prepare(tmp_path, "someone/tiny", pinned)
    assert build.summary["vocabulary"] == tiny.WORDS
    assert read_json(build.work / "source.json")["revision"] == pinned
    weights = weights_of(build.work)
    model = load_causal_lm(weights.folder, device="cpu")
    assert torch.equal(model.lm_head.weight, tiny.causal_lm().lm_head.weight)
    for name in more:
        assert hub.got(name) == [], name
    assert not any(newer in path for _, path, _ in hub.asked)
    assert hub.got("model.safetensors") == [""]
    asked = len(hub.asked)
    assert weights_of(build.work) == weights
    assert len(hub.asked) == asked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_another_checksum_is_refused(hub, files, name, tmp_path):
    harmed = bytearray(files[name])
    harmed[len(harmed) // 2] ^= 1  # of the same size, which the library compares
    hub.damaged[name] = bytes(harmed)
    commit = hub.add("someone/tiny", files)
    with pytest.raises(BadInput, match=rf"someone/tiny at {commit[:8]}: {name} has checksum .*, the hub says .*remove"):
        model_snapshot("someone/tiny", commit)
    (blob,) = (p.resolve() for p in (tmp_path / "cache").rglob(name))
    blob.unlink()
    hub.damaged.clear()
    assert (model_snapshot("someone/tiny", commit) / name).read_bytes() == files[name]


def test_a_broken_connection_is_taken_up_where_it_ended(hub, files):
    hub.cut["model.safetensors"] = [10_000]
    commit = hub.add("someone/tiny", files)
    folder = model_snapshot("someone/tiny", commit)
    first, second = hub.got("model.safetensors")
    assert (first, second) == ("", "bytes=8192-")  # whole chunks of 4096
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_the_run_after_a_failed_download_gets_the_files_that_are_not_whole(hub, files):
    hub.cut["model.safetensors"] = [10_000] + [0] * 6  # more often than the library tries
    commit = hub.add("someone/tiny", files)
    with pytest.raises(BadInput, match=r"cannot be loaded \(.*\); run again to go on with what is there"):
        model_snapshot("someone/tiny", commit)
    hub.cut.clear()
    hub.asked.clear()
    folder = model_snapshot("someone/tiny", commit)
    assert hub.got("model.safetensors") == [""]  # the library resumes a file within a run only
    assert hub.got("config.json") == []
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_offline_a_whole_download_is_enough_and_part_of_one_or_none_is_told(hub, files, monkeypatch):
    whole, part = hub.add("someone/tiny", files), hub.add("someone/part", files)
    folder = model_snapshot("someone/tiny", whole)
    hub.cut["model.safetensors"] = [0] * 7
    with pytest.raises(BadInput):
        model_snapshot("someone/part", part)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert model_snapshot("someone/tiny", whole) == folder
    for repo, commit in (("someone/part", part), ("someone/never", "0" * 40)):
        with pytest.raises(BadInput, match=r"not \(wholly\) in this machine's cache, and the hub cannot be reached"):
            model_snapshot(repo, commit)
    assert len(hub.asked) == asked


def test_what_the_hub_refuses_is_told_in_one_line(hub, files):
    hub.add("someone/tiny", files)
    hub.gated.add("someone/gated")
    for repo, words in (
        ("someone/tiny", "the repository has no such commit; pin one that it has"),
        ("someone/none", "the hub has no such repository, or it is private"),
        ("someone/gated", "its licence has to be accepted on the hub, and HF_TOKEN set"),
    ):
        with pytest.raises(BadInput, match=f"{repo} at 00000000: {words}"):
            model_snapshot(repo, "0" * 40)


def test_pickled_weights_are_neither_read_nor_downloaded(hub, files, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    only = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    commit = hub.add("someone/pickled", only | {"pytorch_model.bin": pickle.dumps(Harm())})
    with pytest.raises(BadInput, match="no safetensors in it, and pickled weights can run code when they are read"):
        prepare(tmp_path, "someone/pickled", commit)
    assert hub.got("pytorch_model.bin") == []
    assert not (tmp_path / "harmed").exists()


def test_a_models_own_code_runs_only_where_that_is_declared(hub, files, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads(files["config.json"]) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    code = (
        "import pathlib\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    commit = hub.add("someone/own", files | {"config.json": json.dumps(config).encode(), "own.py": code.encode()})
    with pytest.raises(BadInput, match="declare 'trust_remote_code: true' with the model if you trust it"):
        load_causal_lm(model_snapshot("someone/own", commit), device="cpu")
    assert hub.got("own.py") == []
    assert not (tmp_path / "ran").exists()
    weights = weights_of(prepare(tmp_path, "someone/own", commit, trust_remote_code=True).work)
    assert weights.trusted
    model = load_causal_lm(weights.folder, device="cpu", **weights.loading())
    assert type(model).__name__ == "OwnModel"
    assert (tmp_path / "ran").exists()


# --- the command line, in processes of its own --------------------------------------------------------------------

RUN = """
import sys
from prefopt.cli import main

for line in sys.stdin:
    if code := main(line.split()):
        sys.exit(code)
"""


def test_with_hf_endpoint_a_model_and_a_data_set_come_from_the_hub_and_then_without_it(files, tmp_path):
    pairs = pd.DataFrame(
        {
            "prompt": [f"w{at} w{at + 1}" for at in range(30)],
            "chosen": [f"w{at} w5" for at in range(30)],
            "rejected": [f"w{at} w6 w7" for at in range(30)],
        }
    )
    with fake_hub.serving() as hub:
        model = hub.add("someone/tiny", files)
        data = hub.add("someone/pairs", {"data/train-0.parquet": pairs.to_parquet()}, kind="datasets")
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = stages(tmp_path, "online", online, model, data)
        assert done.returncode == 0, done.stderr
        assert hub.got("data/train-0.parquet")
        asked = len(hub.asked)
        again = stages(tmp_path, "offline", online | {"HF_HUB_OFFLINE": "1"}, model, data, "1" * 40)
        assert len(hub.asked) == asked
    # All stages of what was downloaded, then pairs of a commit that was not.
    assert again.returncode == 2
    assert (
        again.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "prefopt prepare-pairs: someone/pairs at 11111111, split 'train': cannot be loaded "
            "(what was found is of another commit, and the hub cannot be reached)"
        )
    )
    assert "Traceback" not in again.stderr
    outputs = [
        {
            p.relative_to(tmp_path / name / "results"): file_sha256(p)
            for stage in ("pairs", "base", "tokens")
            for p in tree_files(tmp_path / name / "results" / stage)
        }
        for name in ("online", "offline")
    ]
    assert len(outputs[0]) > 5
    assert outputs[0] == outputs[1]


def stages(tmp_path, name, environment, model, data, *more_data):
    """prepare-pairs, prepare-model and tokenize in one new process, then prepare-pairs of more data."""
    pairs, *more = (pairs_of(commit) for commit in (data, *more_data))
    spec = {"kind": "hub", "repo": "someone/tiny", "revision": model, "trust_remote_code": False}
    base = Node("base", 1, "tiny", spec, {})
    tokens = Node("tokens", 1, "tokens", {"template": "plain"}, {"pairs": pairs.ref, "base": base.ref})
    (tmp_path / name).mkdir()
    lines = []
    wanted = [("prepare-pairs", pairs), ("prepare-model", base), ("tokenize", tokens)]
    for verb, node in [*wanted, *(("prepare-pairs", node) for node in more)]:
        path = tmp_path / name / "results" / "specs" / f"{node.ref}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(node.to_json()))
        lines.append(f"{verb} --spec {path}")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), **environment}
    for inherited in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
        environment.pop(inherited, None)
    command = [sys.executable, "-c", RUN]
    return subprocess.run(
        command,
        input="\n".join(lines),
        cwd=tmp_path / name,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def pairs_of(commit):
    source = {"kind": "hub", "repo": "someone/pairs", "revision": commit, "split": "train"}
    return Node("pairs", 1, "pairs", {"source": source, "splits": {"train": 0.5, "test": 0.5}}, {})

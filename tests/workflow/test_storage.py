"""Results in a storage, by Snakemake's own plugins: what another machine finds there, makes, and is told."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from installed import packages_of
from marks import long
from prefopt.artifacts import Node, outputs_digest, read_manifest
from prefopt.store.bundles import unpack, write_bundle
from s3_server import s3_server, s3_tools
from small_project import Project, new_project, snakemake_words

KEYS = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "x", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "x"}

# A cluster whose one node is another folder: what a job needs comes out of the storage.
SUBMIT = """cd {node}; mkdir -p jobs; cp "$1" jobs/$$.sh
(bash jobs/$$.sh > jobs/$$.log 2>&1; echo $? > jobs/$$.code) > /dev/null 2>&1 < /dev/null &
echo $$
"""
STATUS = """if [ ! -f {node}/jobs/$1.code ]; then echo running
elif [ "$(cat {node}/jobs/$1.code)" = 0 ]; then echo success
else echo failed; fi
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync, which the storage plugin for folders calls")
    return packages_of("storage", tmp_path_factory.mktemp("plugins"))


class Machine(Project):
    """A checkout of its own with results of its own, and a storage that it shares with others."""

    def command(self, *words: object, provider: str = "fs", prefix: object = "../remote") -> list[str]:
        storage = ("--default-storage-provider", provider, "--default-storage-prefix", prefix)
        return [sys.executable, "-m", *snakemake_words(*storage, *words)]

    def jobs(self, plugins: Path, *words: object, **variables: str) -> dict[str, int]:
        """Run with the storage; rule -> number of jobs."""
        run = self.run(plugins, *words, **variables)
        assert run.returncode == 0, run.stdout + run.stderr
        text = run.stdout + run.stderr
        stats = re.search(r"^Job stats:\n(.*?)^total", text, re.MULTILINE | re.DOTALL)
        assert stats or "Nothing to be done" in text, text
        return {
            rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", stats[1] if stats else "", re.MULTILINE)
        }

    def run(self, plugins: Path, *words: object, provider="fs", prefix=None, warm=False, **variables: str):
        command = self.command(*words, provider=provider, prefix=prefix or self.remote)
        command = [sys.executable, "-m", "prefopt", "launch", "--", *command] if warm else command
        env = self.variables(plugins) | variables
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def variables(self, *plugins: Path) -> dict[str, str]:
        path = os.pathsep.join([*map(str, plugins), os.environ.get("PYTHONPATH", "")])
        return {**self.environment(), "PYTHONPATH": path}

    @property
    def remote(self) -> Path:
        return self.folder.parent / "remote"

    def bundle(self, stage: str) -> str:
        return f"{stage}/{self.spec(stage).stem}.tar"

    def digests(self) -> dict[str, str]:
        """What every finished artifact holds."""
        found = sorted((self.folder / "results").glob("*/*-????????/manifest.json"))
        found += sorted((self.folder / "results").glob("papers/*/*-????????/manifest.json"))
        return {"/".join(path.parts[-3:-1]): outputs_digest(path.parent) for path in found}


def machine(folder: Path) -> Machine:
    return Machine(new_project(folder).folder)


def test_another_machine_takes_parents_out_of_the_storage_and_makes_the_same_bytes(finished, plugins, tmp_path):
    first, second = Machine(finished.folder), machine(tmp_path / "second")
    for stage in ("pairs", "base"):
        path = second.remote / first.bundle(stage)
        path.parent.mkdir(parents=True)
        write_bundle(first.folder / "results", path.relative_to(second.remote).with_suffix("").as_posix(), path)
    assert second.jobs(plugins, "--", first.bundle("tokens")) == {"tokenize": 1}
    assert {ref.split("/")[0] for ref in second.digests()} == {"pairs", "base", "tokens"}
    assert set(second.digests().items()) < set(first.digests().items())
    check_bundles(second.remote, tmp_path / "third")


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_results_that_lie_here_are_stored_and_not_made_again(finished, plugins, tmp_path):
    first, second = Machine(finished.copy(tmp_path / "first").folder), machine(tmp_path / "second")
    made = first.digests()
    assert first.jobs(plugins, "--", "artifacts")["train_policy"] == 4
    log = first.artifact("policy", "dpo").name
    said = (first.folder / "results" / "logs" / "policy" / f"{log}.log").read_text()
    assert said.endswith("it is stored and not made again\n")
    assert first.digests() == made
    assert first.jobs(plugins, "-n", "--", "artifacts") == {}
    assert second.jobs(plugins, "-n", "--", "artifacts") == {}


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_cluster_that_shares_nothing_but_the_storage(finished, plugins, tmp_path, tmp_path_factory):
    """The main machine only submits: it fetches no bundle and makes no artifact."""
    head, node = machine(tmp_path / "head"), machine(tmp_path / "node")
    for name, text in {"submit": SUBMIT, "status": STATUS}.items():
        (tmp_path / name).write_text(text.format(node=node.folder))
    cluster = packages_of("kubernetes", tmp_path_factory.mktemp("cluster"))
    head.prefopt("plan", "--list", check=True)
    assert not head.run(plugins, "-n").returncode
    words = ["--executor", "cluster-generic", "--jobs", 1, "--shared-fs-usage", "none"]
    for name in ("submit", "status"):
        words += [f"--cluster-generic-{name}-cmd", f"bash {tmp_path / name}"]
    command = head.command(*words, "--", head.bundle("sft"), prefix=head.remote)
    run = subprocess.run(
        command, cwd=head.folder, env=head.variables(plugins, cluster), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert head.digests() == {}
    made = Machine(finished.folder).digests()
    assert {ref: made[ref] for ref in node.digests()} == node.digests()
    assert {ref.split("/")[0] for ref in node.digests()} == {"pairs", "base", "tokens", "sft"}
    assert (head.remote / "results" / "logs" / "sft").is_dir(), "logs of such jobs lie in the storage"


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_leaves_only_whole_bundles_and_ends_in_the_same_bytes(
    finished, plugins, tmp_path
):
    some, draw = machine(tmp_path / "first"), random.Random(7)
    for turn in range(12):
        command = some.command("--", "artifacts", prefix=some.remote)
        run = subprocess.Popen(
            command, cwd=some.folder, env=some.variables(plugins), start_new_session=True, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(3, 12))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        shutil.rmtree(some.folder / ".snakemake" / "locks", ignore_errors=True)
        check_bundles(some.remote, tmp_path / f"checked{turn}")
        if turn % 3 == 2:  # a machine with another disk goes on
            shutil.rmtree(some.folder / "results")
    some.jobs(plugins, warm=True)
    assert some.digests() == Machine(finished.folder).digests()
    assert some.jobs(plugins) == {}


def check_bundles(remote: Path, folder: Path) -> None:
    """Every bundle in a storage can be unpacked with all that is behind it."""
    unpack(sorted(remote.glob("*/*.tar")), folder)
    for path in folder.glob("*/*/manifest.json"):
        assert Node.from_json(read_manifest(path)).ref == "/".join(path.parts[-3:-1])


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_damaged_bundle_is_told_by_name_and_made_again_where_it_was_removed(finished, plugins, tmp_path):
    first = Machine(finished.copy(tmp_path / "first").folder)
    first.jobs(plugins)
    tokens = first.remote / first.bundle("tokens")
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    tokens.write_bytes(data)
    second = machine(tmp_path / "second")
    (first.remote / first.bundle("sft")).unlink()
    run = second.run(plugins, "--", first.bundle("sft"), warm=True)
    assert run.returncode
    assert re.search(rf"{tokens.name}: damaged.*remove it from the storage", run.stderr.splitlines()[-1])
    assert "sft" not in {ref.split("/")[0] for ref in second.digests()}
    tokens.unlink()
    assert second.jobs(plugins, "--", first.bundle("sft")) == {"tokenize": 1, "train_sft": 1}
    made = first.digests()
    assert {ref: made[ref] for ref in second.digests()} == second.digests()


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_the_whole_run_through_an_s3_bucket(finished, plugins, tmp_path):
    tools = s3_tools()
    first, second = machine(tmp_path / "first"), machine(tmp_path / "second")
    with s3_server(tools) as address:
        bucket = {"provider": "s3", "prefix": "s3://lab/prefopt", **KEYS}
        endpoint = ("--storage-s3-endpoint-url", address)
        assert first.jobs(plugins, *endpoint, warm=True, **bucket)["train_policy"] == 4
        assert first.digests() == Machine(finished.folder).digests()
        assert first.jobs(plugins, *endpoint, **bucket) == {}
        assert second.jobs(plugins, *endpoint, **bucket) == {"publish": 1, "report": 1, "all": 1}
        assert second.digests() == first.digests()

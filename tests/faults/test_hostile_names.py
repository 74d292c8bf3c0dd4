"""Names, paths and values that a shell would run: nothing runs, in make, in the rules, or in the jobs of a cluster."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from prefopt.errors import BadInput
from prefopt.plan import readable_name
from prefopt.planning.config import check_place, item_files, load_config
from prefopt.specs.base import plain_folder
from small_project import ROOT, Project, hh_rows, item, new_project

HARM = [
    "a; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a && touch pwned",
    "a | touch pwned",
    "a > pwned",
    "a'; touch pwned; '",
    'a"; touch pwned; "',
    "a\ntouch pwned",
    "a\\; touch pwned",
    "'a'; touch pwned; 'b'",
    "$(shell touch pwned)",
]
OUTSIDE = ["-x", "--help", "a\x00b", ""]


def unharmed(folder: Path) -> bool:
    return not list(folder.rglob("pwned*"))


# --- make -----------------------------------------------------------------------------------------------------------

RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word" >> told; done
printf '\\0' >> told
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The Makefile beside a finished set-up, whose python writes down the words that it is called with."""
    for name in ("requirements.lock", "pyproject.toml", "envs/bootstrap.txt", "workflow/setup.sh", ".venv/.ready"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 2 if name.endswith(".ready") else 1))
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(RECORDER)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def calls(checkout: Path) -> list[list[str]]:
    parts = (checkout / "told").read_bytes().decode().split("\0\0")
    return [part.split("\0") for part in parts if part]


def make(checkout: Path, *words: str) -> list[str]:
    """The words of the first call that a target makes."""
    run = subprocess.run(["make", *words], cwd=checkout, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return calls(checkout)[0]


@pytest.mark.parametrize("value", [*HARM, "../../x", "-x", "two words", "x$y"])
def test_make_hands_values_on_as_they_are(checkout, value):
    words = make(checkout, "reproduce", f"DATA_ROOT={value}", f"ITEMS={value}", f"RESULTS={value}", f"PROFILE={value}")
    assert words[:3] == ["-m", "prefopt", "launch"]
    assert words[3:] == [
        f"--logs={value}/logs",
        *("--", "snakemake", f"--workflow-profile={value}", "--config"),
        *(f"items={value}", f"data_root={value}", f"results={value}"),
    ]
    assert unharmed(checkout)


def test_make_without_values_leaves_all_to_the_configuration(checkout):
    assert make(checkout, "reproduce")[3:] == ["--logs=results/logs", "--", *PLAIN]
    (checkout / "told").unlink()
    words = make(checkout, "snakemake", "TARGET=own; touch pwned", "FULL=1")
    assert words[5:] == [*PLAIN, "--config", "full=true", "--", "own; touch pwned"]
    assert unharmed(checkout)


PLAIN = ["snakemake", "--workflow-profile=workflow/profiles/local"]


# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["results", "data_root", "items"])
@pytest.mark.parametrize("value", [*HARM, *OUTSIDE])
def test_values_that_executors_write_into_job_scripts_are_refused(tmp_path, key, value):
    (tmp_path / "config.yaml").write_text("items: [own/*]\n")
    with pytest.raises(BadInput, match=rf"config\.yaml: {key}") as caught:
        load_config(tmp_path / "config.yaml", {key: [value] if key == "items" else value})
    assert "\n" not in str(caught.value).replace(value, "")


@pytest.mark.parametrize("image", ["docker://a; touch pwned", "$(touch pwned)", "-v", "a b", "a'b"])
def test_an_image_is_a_name(tmp_path, image):
    (tmp_path / "config.yaml").write_text("items: [own/*]\n")
    with pytest.raises(BadInput, match=r"execution\.container"):
        load_config(tmp_path / "config.yaml", {"execution": {"container": image}})
    told = {"execution": {"container": "docker://registry.example:5000/lab/prefopt@sha256:0a"}}
    assert load_config(tmp_path / "config.yaml", told).execution.container == told["execution"]["container"]


@pytest.mark.parametrize("pattern", ["../../x", "own/../../x", "/etc/passwd", "own/../own/hh_rlhf", ".."])
def test_items_lie_below_the_declarations(tmp_path, pattern):
    (tmp_path / "config.yaml").write_text("items: [own/*]\n")
    with pytest.raises(BadInput, match=r"items\.0: a name or pattern such as"):
        load_config(tmp_path / "config.yaml", {"items": pattern})


@pytest.mark.parametrize("name", [*HARM, "../x", "-x", "A", ".x", "x\n"])
@pytest.mark.parametrize("where", ["paper", "item", "arm", "reward"])
def test_names_of_papers_items_arms_and_ensembles_are_plain(project, where, name):
    from prefopt.planning.config import load_item

    content = item()
    if where in ("paper", "item"):
        content["item"] |= {"paper" if where == "paper" else "name": name}
    elif where == "arm":
        content["arms"][name] = content["arms"]["dpo"]
    else:
        content["rewards"][name] = content["rewards"]["single"]
    path = project.folder / "config" / "experiments" / "own" / "tiny.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"(?s)tiny\.yaml: .*should match pattern"):
        load_item(path)


@pytest.mark.parametrize("name", [*HARM, *OUTSIDE, "../../x", "x" * 300, "\u202egnp.exe", "%2e%2e/x"])
def test_ids_are_made_of_plain_letters(name):
    made = readable_name(name)
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert made[0].isalnum()
    assert made[-1].isalnum()
    assert len(f".{made}-01234567.json.a1b2c3d4") < 255  # a file being written, on file systems that take 255 bytes


def test_ordinary_folders_are_accepted():
    for path in (".", "../data", "/data/pairs (2)", "~lab/a_b-c+d,e=f@g:h", "Daten für uns", "results#1"):
        assert plain_folder(path) == path


# --- the rules ------------------------------------------------------------------------------------------------------

FILES = ["$(touch pwned);touch pwned.jsonl", "a'b.jsonl", 'c"d.jsonl', "e\ntouch pwned\n.jsonl", "-n.jsonl"]


def hostile_project(folder: Path) -> Project:
    """Pairs in files whose names are commands, under a title that is one too."""
    project = new_project(folder)
    rows = hh_rows(60)
    for number, name in enumerate(FILES):
        part = rows[number :: len(FILES)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    content = item()
    content["item"] |= {"title": "t'; touch pwned; '$(touch pwned)", "note": "`touch pwned`"}
    content["data"]["source"]["paths"] = FILES
    project.declare(content)
    return project


def test_rules_run_over_files_whose_names_are_commands(tmp_path):
    """In a folder with a space in its name, too."""
    project = hostile_project(tmp_path / "two words")
    project.snakemake("-n", check=True)
    assert project.artifact("pairs").name.startswith("touch-pwned-touch-pwned-")
    project.snakemake(project.artifact("pairs").relative_to(project.folder) / "manifest.json", check=True)
    summary = json.loads((project.artifact("pairs") / "manifest.json").read_text())["summary"]
    assert summary["pairs"] == 60
    assert set(summary["sources"]) == set(FILES)
    found = [path.relative_to(project.folder) for path in project.folder.rglob("pwned*")]
    assert found == []


def test_the_snakefile_refuses_values_and_places_in_one_line(project):
    told = project.snakemake("-n", "--config", "data_root=a'$(touch pwned)")
    assert told.returncode == 2
    assert [line for line in told.stderr.splitlines() if line.startswith("prefopt")] == [
        'prefopt plan: config/config.yaml: data_root: a folder whose name has no "\'" is expected, since jobs run '
        "through a shell"
    ]
    assert unharmed(project.folder)
    for place in ("/data/a'b", "/data/$(touch pwned)", "/data/a\nb"):
        with pytest.raises(BadInput, match="jobs run through a shell; move the checkout"):
            check_place(Path("/data/x y"), Path(place))


def test_a_pattern_matches_no_file_outside(tmp_path):
    (tmp_path / "config" / "experiments" / "own").mkdir(parents=True)
    with pytest.raises(BadInput, match="no item 'own/x'"):
        item_files(tmp_path / "config", ["own/x"])

"""Every command in README and docs names verbs, options, targets, files and items that exist; so does every link."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from prefopt.cli import parser
from prefopt.errors import BadInput
from prefopt.planning.config import item_files
from prefopt.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks/", "config/", "docs/", "envs/", "tests/", "workflow/")
MADE_BY_THE_PAGE = {"add_a_loss.md": {"own/squared"}, "your_pairs.md": {"own/mine"}}


def blocks(text: str) -> list[str]:
    """Fenced blocks without a language or of a shell, and indented ones, as lists of lines."""
    fenced = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    without = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?:^    \S.*\n(?:^ {4,}.*\n)*)", without, re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Words of every command of a page: continued lines joined, comments and the brackets of synopses gone."""
    found = []
    for block in blocks(text):
        joined = re.sub(r"\\\n|\n(?=\s+\[?--)", " ", block)
        for line in joined.splitlines():
            for part in re.split(r"&&|\|\s", line.split("  #")[0]):
                try:
                    words = shlex.split(re.sub(r"(?<!\S)\[|\](?!\S)", " ", part), comments=True)
                except ValueError:  # prose or a table in an indented block
                    continue
                while words and re.fullmatch(r"[A-Z_]+=\S*|\$", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def verbs() -> dict[str, set[str]]:
    (action,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return {name: set(verb._option_string_actions) for name, verb in action.choices.items()}


def bad_prefopt(words: list[str], page: Path) -> list[str]:
    known = verbs()
    if not words or words[0].startswith("-"):
        return []
    if words[0] not in known and not words[0].isupper():
        return [f"no verb {words[0]}"]
    if words[0] == "launch" or words[0].isupper():
        return []
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    found = [f"{words[0]} has no {option}" for option in options if option not in known[words[0]]]
    named = [words[words.index("--items") + 1]] if "--items" in words else []
    if words[0] == "plan":
        named += [word for word in words[1:] if re.fullmatch(r"[a-z_]+/[\w/*]+", word)]
    return found + bad_items(",".join(named), page)


def bad_items(names: str, page: Path) -> list[str]:
    wanted = [name for name in names.split(",") if name and name not in MADE_BY_THE_PAGE.get(page.name, ())]
    try:
        item_files(ROOT / "config", wanted or ["*/*"])
    except BadInput as error:
        return [str(error)]
    return []


def bad_make(words: list[str], page: Path) -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*(?: [a-z][\w-]*)*):", makefile, re.MULTILINE))
    targets = {one for several in targets for one in several.split()}
    found = []
    for word in words:
        variable, equals, value = word.partition("=")
        if not equals:
            found += [] if word in targets or word.startswith("-") else [f"no target {word}"]
        elif not re.search(rf"\$\((?:value )?{variable}\)", makefile) and variable != "PYTHON":
            found.append(f"no variable {variable}")
        elif variable == "ITEMS":
            found += bad_items(value, page)
    return found


def bad_paths(words: list[str]) -> list[str]:
    found = []
    for word in words:
        path = word.split("::")[0].rstrip(",;:")
        if path.startswith(FOLDERS) and not re.search(r"[<>*{}$]", path) and not (ROOT / path).exists():
            found.append(f"no file {path}")
    return found


def bad_benchmark(module: str, words: list[str]) -> list[str]:
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return [f"no module {module}"]
    source = path.read_text(encoding="utf-8")
    for name in re.findall(r"from benchmarks\.?(\w*) import", source):  # options that several benchmarks share
        source += (ROOT / "benchmarks" / f"{name or '__init__'}.py").read_text(encoding="utf-8")
    if "add_argument" not in source:
        return []
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    return [f"{module} has no {option}" for option in options if f'"{option}"' not in source]


def complaints(words: list[str], page: Path) -> list[str]:
    """What is wrong with one command."""
    found = bad_paths(words)
    if words[:3] == ["python", "-m", "prefopt"]:
        found += bad_prefopt(words[3:], page)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        found += bad_benchmark(words[2], words[3:])
    elif words[0] == "make":
        found += bad_make(words[1:], page)
    return found


def test_the_design_names_every_stage_and_no_other():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text[text.index("**Stages.**") : text.index("**Exact items**")]
    named = re.findall(r"^\| ([a-z]+(?:-[a-z]+)*) \|", table, re.MULTILINE)
    assert sorted(named) == sorted([*STAGES, "stage"])


def test_there_are_many_commands():
    counted = [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    assert sum(words[:3] == ["python", "-m", "prefopt"] for words in counted) > 15
    assert sum(words[0] == "make" for words in counted) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    wrong = {" ".join(words): found for words in commands(text) if (found := complaints(words, page))}
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_verbs_and_targets(page):
    text = page.read_text(encoding="utf-8")
    wrong = {}
    for inline in re.findall(r"(?<!`)`((?:python -m prefopt|make) [^`\n]+)`", text):
        words = [word for word in inline.split() if word not in ("...", "…")]
        if found := complaints(words, page):
            wrong[inline] = found
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m prefopt plant", "no verb plant"),
        ("python -m prefopt plan --gpus h100:8", "plan has no --gpus"),
        ("python -m prefopt plan --items mallowspo/fig77", "fig77"),
        ("make reproduced", "no target reproduced"),
        ("make reproduce ITEM=own/hh_rlhf", "no variable ITEM"),
        ("make reproduce ITEMS=own/hh", "own/hh"),
        ("python -m benchmarks.nothing", "no module benchmarks.nothing"),
        ("python -m benchmarks.cost_model --result results", "benchmarks.cost_model has no --result"),
        ("python -m pytest tests/unit/test_nothing.py", "no file tests/unit/test_nothing.py"),
    ],
)
def test_a_wrong_command_is_seen(command, wrong):
    (words,) = commands(f"```\n{command}  # why\n```\n")
    assert any(wrong in one for one in complaints(words, ROOT / "README.md"))

"""Files for contributors name tools, tests and versions that exist."""

from __future__ import annotations

import re
import tomllib

import yaml

import prefopt


def test_the_fast_suite_names_test_files(root):
    makefile = (root / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    names = re.search(r"^FAST := (.*)$", makefile, re.MULTILINE)[1].split()
    assert len(names) == len(set(names)) > 20
    assert [name for name in names if not (root / "tests" / "unit" / f"test_{name}.py").is_file()] == []


def test_hooks_call_pinned_tools_of_the_environment(root):
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pinned = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    developer = {name.split("==")[0] for name in pinned["project"]["optional-dependencies"]["dev"]}
    assert len(hooks) == 4
    for hook in hooks:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/")
        assert tool.rsplit("/", 1)[1] in developer


def test_the_citation_is_of_this_version(root):
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == prefopt.__version__
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["license"] == project["license"] == "MIT"
    assert project["license-files"] == ["LICENSE"]
    assert (root / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    papers = {re.search(r"\d{4}\.\d{5}", paper["url"])[0] for paper in cited["references"]}
    assert papers == {"2405.14953", "2405.19316"}


def test_the_changelog_has_this_version(root):
    assert f"## {prefopt.__version__}," in (root / "CHANGELOG.md").read_text(encoding="utf-8")

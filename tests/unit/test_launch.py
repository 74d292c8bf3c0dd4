"""What the command line says around a run: the time that jobs will still take, and the verb that was meant."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from prefopt import progress
from prefopt.cli import main
from prefopt.processes import launch

WORKFLOW = """
sleep 0.2
for done in $(seq 1 20); do
  echo "Finished jobid: $done\n$done of 20 steps ($((5 * done))%) done" >> .snakemake/log/this.log
  sleep 0.05
done
sleep 0.2
"""


def test_a_run_tells_the_time_that_its_jobs_will_take_from_snakemakes_own_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    (tmp_path / "results").mkdir()
    (tmp_path / ".snakemake" / "log").mkdir(parents=True)
    (tmp_path / ".snakemake" / "log" / "old.log").write_text("9 of 9 steps (100%) done\n")
    assert launch.launch(["sh", "-c", WORKFLOW], Path("results/logs")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert 3 < len(lines) < 20
    assert all(re.fullmatch(r"\d+ of 20 jobs, about 00:0\d left", line) for line in lines), lines
    assert lines[-1] == "20 of 20 jobs, about 00:00 left"


def test_a_run_without_a_log_says_nothing_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_SECONDS", 0.01)
    with launch.jobs_left(tmp_path / "not there"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("word", "tail"), [("pla", "did you mean 'plan'?"), ("trian-sft", "did you mean 'train-sft'?")]
)
def test_a_word_that_is_no_verb_is_one_line_with_the_nearest(capsys, word, tail):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"prefopt: no verb '{word}'; {tail}\n"


def test_a_verb_that_is_stopped_from_the_keyboard_ends_in_one_line(capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prefopt.plan.load_plan", stopped)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "prefopt plan: stopped\n"
    with pytest.raises(KeyboardInterrupt):
        main(["plan", "--debug"])

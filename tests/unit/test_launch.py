"""What the command line says around a run: the time that jobs will still take, and the verb that was meant."""

from __future__ import annotations

import time

import pytest

from prefopt import launch, progress
from prefopt.cli import main


def test_the_time_that_jobs_will_take_is_told_from_snakemakes_own_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    (tmp_path / "old.log").write_text("9 of 9 steps (100%) done\n")
    with launch.jobs_left(tmp_path):
        log = tmp_path / "this.log"
        log.write_text("1 of 20 steps (5%) done\n")
        time.sleep(0.2)
        for done in range(2, 21):
            with log.open("a") as lines:
                lines.write(f"Finished jobid: {done}\n{done} of 20 steps ({5 * done}%) done\n")
            time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert 3 < len(lines) <= 20
    assert all(" of 20 jobs, about 00:0" in line for line in lines), "less than a second a job"
    assert lines[-1].startswith("20 of 20 jobs, about 00:00 left")


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

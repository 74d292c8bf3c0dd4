"""Every stage, killed in its middle and run again, ends with the bytes of a run that nothing disturbed.

Seeds draw the point: the n-th write of the job (files opened for writing, folders, renames, removals), or a share of
the time that the job takes. A few points a stage by default, all with PREFOPT_LONG_TESTS=1.
"""

from __future__ import annotations

import signal

import pytest
import yaml
from killing import VERBS, drawn, killed_after, killed_at_write

from marks import LONG
from prefopt.plan import STAGE_VERSIONS
from prefopt.planning.costs import WORK
from small_project import ROOT

POINTS = 24 if LONG else 2
HEEDING = ("policy", "reference", "trials")  # SIGTERM does more than to end them: training, scoring, both
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def cases() -> list:
    """(stage, signal, seed, kind of point): seeds take turns in signal, pairs of them in the kind.

    By default SIGTERM only reaches some of the stages that heed it.
    """
    kinds = ("write", "time") if LONG else ("write", "write")
    found = []
    for stage in WORK:
        for seed in range(POINTS):
            if not LONG and seed and stage not in HEEDING:
                continue
            number, kind = SIGNALS[seed % 2], kinds[seed // 2 % 2]
            found.append(pytest.param(stage, number, seed, kind, id=f"{stage}-{number.name}-{kind}-seed{seed}"))
    return found


def test_every_stage_has_its_row(everything):
    outs = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["artifacts"]["outs"]
    declared = {path.removeprefix("results/") for out in outs for path in out} | {"papers"}
    made = {node.stage.split("/")[0] for node in everything.nodes.values()}
    assert made == set(WORK) == set(VERBS) == set(STAGE_VERSIONS) == declared


@pytest.mark.parametrize(("stage", "number", "seed", "kind"), cases())
def test_a_killed_stage_ends_in_the_same_bytes(everything, stage, number, seed, kind):
    node, draw = everything.first(stage), drawn(stage, seed)
    before = everything.files()
    try:
        kill = killed_after if kind == "time" else killed_at_write
        code = kill(everything, node, number, draw.uniform(0.05, 0.95))
        # After SIGTERM training and scoring save what they have.
        assert code in ({-number} if number is signal.SIGKILL else {-number, 75}), everything.log(node).read_text()
        everything.check_between(node)
        assert everything.run(node) == 0, everything.log(node).read_text()
        everything.check_after(node, before)
    except BaseException:
        everything.restore(node)
        raise

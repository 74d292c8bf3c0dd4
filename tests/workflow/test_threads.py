"""One thread per job: forked from the warm server, and cold without any setting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from prefopt.files import read_json


def test_warm_and_cold_jobs_compute_with_one_thread(finished, tmp_path):
    manifests = [read_json(path) for path in (finished.folder / "results").glob("*/*/manifest.json")]
    assert {manifest["threads"] for manifest in manifests} == {1}
    clone = finished.copy(tmp_path / "clone")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "prefopt", "generate", "--spec", str(clone.spec("generations", "dpo"))]
    warm = read_json(clone.artifact("generations", "dpo") / "manifest.json")
    shutil.rmtree(clone.artifact("generations", "dpo"))
    subprocess.run(command, cwd=clone.folder, env=environment, check=True)
    cold = read_json(clone.artifact("generations", "dpo") / "manifest.json")
    assert cold["threads"] == 1
    assert cold["outputs"] == warm["outputs"]

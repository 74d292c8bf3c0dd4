"""``python -m prefopt``."""

from __future__ import annotations

import os
import sys

from prefopt.processes.warm import run_in_server
from prefopt.stages import STAGES

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models are fastest with one, and jobs run side by side
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looked for among all packages, which takes 10 ms

words = sys.argv[1:]
code = run_in_server(words) if words and words[0] in STAGES else None
if code is None:
    from prefopt.cli import main

    code = main()
sys.exit(code)

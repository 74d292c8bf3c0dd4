"""``python -m prefopt``."""

from __future__ import annotations

import os
import sys

from prefopt.cli import main

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models are fastest with one, and jobs run side by side
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looked for among all packages, which takes 10 ms
sys.exit(main())

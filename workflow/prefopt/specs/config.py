"""config/config.yaml: what to build, and how jobs run on this machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefopt.specs.base import Closed, Count


class ExecutionSpec(Closed):
    """How jobs run on this machine; changes no result."""

    micro_batch: Count = 32
    threads: Count = 1
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs per model job")
    checkpoint_steps: Count = 100


class Config(Closed):
    """config/config.yaml."""

    items: list[str] = Field(min_length=1, description="paper/item names or patterns below config/experiments")
    results: str = "results"
    data_root: str = "."
    full: bool = Field(False, description="grids in full, instead of what their 'quick' section names")
    execution: ExecutionSpec = ExecutionSpec()

"""config/config.yaml: what to build, and how jobs run on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Folder, ItemPattern

Sharding = Literal["none", "full"]


class ExecutionSpec(Closed):
    """How jobs run on this machine; changes no result."""

    micro_batch: Count = 32
    threads: Count = 1
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs per model job")
    checkpoint_steps: Count = 100
    gradient_checkpointing: bool = Field(False, description="layers run again in the backward pass: less memory")
    compile: bool = Field(False, description="layers of a model in training run through torch.compile")
    processes: Count = Field(1, description="processes of a training job, each with a share of every batch")
    row_processes: Count | None = Field(
        None, description="processes of a job that scores, samples, answers or judges; not given: as 'processes'"
    )
    sharding: Sharding = Field("none", description="full: what is trained is divided among processes, by FSDP2")
    container: Annotated[str, Field(pattern=r"^[A-Za-z0-9./][\w.:/@+-]*$")] | None = Field(
        None, description="image of the jobs, docker://NAME: for --sdm apptainer, Kubernetes"
    )

    @model_validator(mode="after")
    def _sharding_needs_processes(self) -> ExecutionSpec:
        if self.sharding == "full" and self.processes == 1:
            raise ValueError("sharding: full divides a model among processes; set processes to 2 or more")
        return self


class Config(Closed):
    """config/config.yaml."""

    items: list[ItemPattern] = Field(min_length=1, description="paper/item names or patterns below config/experiments")
    results: Folder = "results"
    data_root: Folder = "."
    full: bool = Field(False, description="grids in full, instead of what their 'quick' section names")
    execution: ExecutionSpec = ExecutionSpec()

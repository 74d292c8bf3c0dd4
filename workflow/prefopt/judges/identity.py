"""What a pairwise judge's answers depend on, and what is only a matter of the machine."""

from __future__ import annotations

from typing import Any

from prefopt.judges.templates import TEMPLATES
from prefopt.specs import LmJudgeSpec, ServerJudgeSpec

_OF_THE_MACHINE = ("base_url", "api_key_env", "concurrency", "timeout_seconds", "retries", "prices")


def judge_identity(judge: LmJudgeSpec | ServerJudgeSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hashed spec and execution settings; a local model is a parent of its own and in neither."""
    spec = judge.model_dump(exclude={"model", *_OF_THE_MACHINE})
    spec["template"] = {"name": judge.template, "sha256": TEMPLATES[judge.template].digest}
    if isinstance(judge, LmJudgeSpec):
        return spec, {}
    return spec | {"temperature": 0.0}, judge.model_dump(include=set(_OF_THE_MACHINE))

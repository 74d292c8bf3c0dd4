"""Kubernetes jobs for Snakemake's cluster-generic executor: ``submit``, ``status``, ``cancel``, by kubectl.

Environment: PREFOPT_IMAGE, the image; PREFOPT_CLAIM, the persistent volume claim with the checkout on it;
PREFOPT_MOUNT, where pods mount it (default: the checkout); PREFOPT_NAMESPACE (default: that of kubectl).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def job(image: str, claim: str, mount: str, request: list[str], script: str) -> dict[str, Any]:
    """A job that runs one of Snakemake's job scripts; request: threads, MB of memory, minutes, GPUs."""
    threads, memory_mb, minutes, gpus = map(int, request)
    limits: dict[str, Any] = {"memory": f"{memory_mb}M"}
    if gpus:
        limits["nvidia.com/gpu"] = gpus
    container = {
        "name": "job",
        "image": image,
        "command": ["bash", script],
        "workingDir": os.getcwd(),
        "resources": {"requests": {"cpu": threads, "memory": f"{memory_mb}M"}, "limits": limits},
        "volumeMounts": [{"name": "checkout", "mountPath": mount}],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "checkout", "persistentVolumeClaim": {"claimName": claim}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "prefopt-"},
        "spec": {"backoffLimit": 0, "activeDeadlineSeconds": 60 * minutes, "template": {"spec": pod}},
    }


def submit(*words: str) -> str:
    """Create a job for ``threads memory minutes gpus script``; its name."""
    *request, script = words
    image, claim = (_required(name) for name in ("PREFOPT_IMAGE", "PREFOPT_CLAIM"))
    content = job(image, claim, os.environ.get("PREFOPT_MOUNT", os.getcwd()), request, script)
    return _kubectl("create", "-o", "name", "-f", "-", given=json.dumps(content)).strip()


def status(name: str) -> str:
    """``success``, ``failed`` or ``running``; a job that is gone has failed."""
    found = _kubectl("get", name, "--ignore-not-found", "-o", "json")
    if not found.strip():
        return "failed"
    conditions = json.loads(found)["status"].get("conditions", [])
    held = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return "success" if "Complete" in held else "failed" if "Failed" in held else "running"


def cancel(*names: str) -> str:
    """Delete jobs with their pods."""
    return _kubectl("delete", "--ignore-not-found", "--wait=false", *names)


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        sys.exit(f"kubernetes profile: set {name}; what it means stands in {__file__}")
    return value


def _kubectl(*words: str, given: str | None = None) -> str:
    namespace = os.environ.get("PREFOPT_NAMESPACE")
    command = ["kubectl", *(["--namespace", namespace] if namespace else []), *words]
    run = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"kubernetes profile: {' '.join(command)}: {run.stderr.strip()}")
    return run.stdout


if __name__ == "__main__":
    print({"submit": submit, "status": status, "cancel": cancel}[sys.argv[1]](*sys.argv[2:]))

"""What identifies outside input: the content of data files and model folders, or a pinned revision."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt.digests import digest, file_sha256
from prefopt.errors import BadInput
from prefopt.files import write_text
from prefopt.specs import (
    AlpacaEvalPrompts,
    DataSpec,
    FilePrompts,
    FileRef,
    FilesSource,
    HubModel,
    HubPrompts,
    HubSource,
    LocalModel,
    ScratchModel,
    VotesSource,
)

_DIGEST_CACHE = Path(".snakemake") / "prefopt-digests.json"
_ALPACA_EVAL = "tatsu-lab/alpaca_eval"
# Whose outputs -> file of the hub repository; a local folder may also hold the first as eval_set.json.
_ALPACA_EVAL_FILES = {"gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json", "text_davinci_003": "alpaca_eval.json"}
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.bin")
_CODE_FILES = ("*.py",)
_PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def data_identity(data: DataSpec, data_root: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hashed spec, execution settings and short name of a data set.

    Local files enter by the sha256 of their content: moving them changes nothing, editing them changes every id below.
    """
    spec = data.model_dump()
    source = data.source
    if isinstance(source, FilesSource | VotesSource):
        paths = [data_root / p for p in source.paths]
        if source.sha256 is not None and len(source.sha256) != len(paths):
            raise BadInput(f"data: {len(source.sha256)} sha256 for {len(paths)} paths")
        digests = source.sha256 or [content_sha256(p) for p in paths]
        files = [{"name": p.name, "sha256": digest} for p, digest in zip(paths, digests, strict=True)]
        spec["source"] = source.model_dump(exclude={"paths", "sha256"}) | {"files": files}
        return spec, {"paths": [str(p) for p in paths]}, paths[0].name.split(".")[0].lower()
    if isinstance(source, HubSource):
        return spec, {}, source.repo.rsplit("/", 1)[-1].lower()
    return spec, {}, f"world-{source.domain}"


def prompts_identity(
    prompts: FilePrompts | HubPrompts | AlpacaEvalPrompts, data_root: Path
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hashed spec, execution settings and short name of a prompt set; a local file enters by its content."""
    if isinstance(prompts, HubPrompts):
        return prompts.model_dump(), {}, prompts.repo.rsplit("/", 1)[-1].lower()
    if isinstance(prompts, AlpacaEvalPrompts):
        if prompts.path is None:
            file = {"repo": _ALPACA_EVAL, "revision": prompts.revision, "file": _ALPACA_EVAL_FILES[prompts.baseline]}
            return {"kind": "hub_file", **file}, {}, "alpaca-eval"
        path, pin, reading = _alpaca_eval_file(data_root / prompts.path, prompts.baseline), None, {}
    else:
        path, pin, reading = data_root / prompts.path, prompts.sha256, prompts.model_dump(include={"column", "reader"})
    # a file is the same prompts whether it is called AlpacaEval's or not
    spec = {"kind": "file", "name": path.name, "sha256": pin or content_sha256(path)}
    return spec | {"column": None, "reader": None} | reading, {"path": str(path)}, path.name.split(".")[0].lower()


def _alpaca_eval_file(path: Path, baseline: str) -> Path:
    """The file itself, or the one in a folder that has the baseline's outputs."""
    if not path.is_dir():
        return path
    names = [_ALPACA_EVAL_FILES[baseline], *(["eval_set.json"] if baseline == "gpt4_1106_preview" else [])]
    names = [f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise BadInput(f"{path}: none of {', '.join(names)} in this folder; give the path of the file itself")
    return found


def file_identity(file: FileRef, data_root: Path) -> tuple[dict[str, str], str]:
    """Name with digest of a file that a result depends on, and its path."""
    path = data_root / file.path
    return {"name": path.name, "sha256": file.sha256 or content_sha256(path)}, str(path)


def model_identity(
    model: ScratchModel | LocalModel | HubModel, data_root: Path
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hashed spec, execution settings and short name of a starting model."""
    if isinstance(model, LocalModel):
        folder = data_root / model.path
        digests = {p.name: content_sha256(p) for p in model_folder_files(folder, code=model.trust_remote_code)}
        spec = {"kind": "local", "files": digests, "trust_remote_code": model.trust_remote_code}
        return spec, {"path": str(folder)}, folder.resolve().name.lower()
    if isinstance(model, HubModel):
        return model.model_dump(), {}, model.repo.rsplit("/", 1)[-1].lower()
    return model.model_dump(), {}, f"llama-{model.layers}x{model.hidden}"


def model_folder_files(folder: Path, *, code: bool = False) -> list[Path]:
    """The files that make a Hugging Face model folder, with its Python files where ``code`` is to run.

    BadInput where it is none, or has no safetensors or no tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json, so this is no Hugging Face model folder")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise BadInput(f"{folder}: model folder without tokenizer (no tokenizer.json); save the tokenizer into it")
    check_safe_weights(folder)
    patterns = (*_MODEL_FILES, *_CODE_FILES) if code else _MODEL_FILES
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})


def check_safe_weights(folder: Path) -> None:
    """BadInput where a folder has no safetensors: pickled weights are never read."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)
    found = f"only pickled weights ({pickles[0].name}), which can run code when read" if pickles else "no weights"
    raise BadInput(f"{folder}: {found}; save the model as safetensors with model.save_pretrained('{folder}')")


def content_sha256(path: Path) -> str:
    """sha256 of a file, or of a folder's files in order; remembered by path, size and time of change.

    Raises BadInput where nothing is there.
    """
    if os.path.isdir(path):  # unlike pathlib's, False for names that no file can have
        files = {str(p.relative_to(path)): content_sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
        return digest(files)
    if not os.path.isfile(path):  # a device or a pipe may never end
        raise BadInput(f"{path}: no such file; set data_root, or the path where it is declared")
    stat = path.stat()
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
    remembered = _read_cache()
    key = str(path.resolve())
    if remembered.get(key, {}).get("stamp") == stamp:
        return remembered[key]["sha256"]
    found = file_sha256(path)
    with suppress(OSError):  # remembered or not, the digest is the same
        write_text(_DIGEST_CACHE, json.dumps({**_read_cache(), key: {"stamp": stamp, "sha256": found}}))
    return found


def _read_cache() -> dict[str, dict[str, str]]:
    try:
        return json.loads(_DIGEST_CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

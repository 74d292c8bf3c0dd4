"""What identifies outside input: the content of data files and model folders, or a pinned revision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prefopt.artifacts import canonical_json, file_sha256, write_text
from prefopt.errors import BadInput
from prefopt.specs import DataSpec, FilesSource, HubModel, HubSource, LocalModel, ScratchModel

_DIGEST_CACHE = Path(".snakemake") / "prefopt-digests.json"
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.bin")


def data_identity(data: DataSpec, data_root: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hashed spec, execution settings and short name of a data set.

    Local files enter by the sha256 of their content: moving them changes nothing, editing them changes every id below.
    """
    spec = data.model_dump()
    source = data.source
    if isinstance(source, FilesSource):
        paths = [data_root / p for p in source.paths]
        if source.sha256 is not None and len(source.sha256) != len(paths):
            raise BadInput(f"data: {len(source.sha256)} sha256 for {len(paths)} paths")
        digests = source.sha256 or [content_sha256(p) for p in paths]
        files = [{"name": p.name, "sha256": digest} for p, digest in zip(paths, digests, strict=True)]
        spec["source"] = {"kind": "files", "reader": source.reader, "files": files}
        return spec, {"paths": [str(p) for p in paths]}, paths[0].name.split(".")[0].lower()
    if isinstance(source, HubSource):
        return spec, {}, source.repo.rsplit("/", 1)[-1].lower()
    return spec, {}, f"world-{source.domain}"


def model_identity(
    model: ScratchModel | LocalModel | HubModel, data_root: Path
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hashed spec, execution settings and short name of a starting model."""
    if isinstance(model, LocalModel):
        folder = data_root / model.path
        digests = {p.name: content_sha256(p) for p in model_folder_files(folder)}
        spec = {"kind": "local", "files": digests, "trust_remote_code": model.trust_remote_code}
        return spec, {"path": str(folder)}, folder.resolve().name.lower()
    if isinstance(model, HubModel):
        return model.model_dump(), {}, model.repo.rsplit("/", 1)[-1].lower()
    return model.model_dump(), {}, f"llama-{model.layers}x{model.hidden}"


def model_folder_files(folder: Path) -> list[Path]:
    """The files that make a Hugging Face model folder; BadInput where it is none or has no tokenizer."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json, so this is no Hugging Face model folder")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise BadInput(f"{folder}: model folder without tokenizer (no tokenizer.json); save the tokenizer into it")
    return sorted({p for pattern in _MODEL_FILES for p in folder.glob(pattern) if p.is_file()})


def content_sha256(path: Path) -> str:
    """sha256 of a file, or of a folder's files in order; remembered by path, size and time of change.

    Raises BadInput where nothing is there.
    """
    if path.is_dir():
        files = {str(p.relative_to(path)): content_sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
        return hashlib.sha256(canonical_json(files).encode()).hexdigest()
    try:
        stat = path.stat()
    except OSError:
        raise BadInput(f"{path}: no such file; set data_root or the path in datasets.yaml") from None
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
    remembered = _read_cache()
    key = str(path.resolve())
    if remembered.get(key, {}).get("stamp") == stamp:
        return remembered[key]["sha256"]
    digest = file_sha256(path)
    write_text(_DIGEST_CACHE, json.dumps({**_read_cache(), key: {"stamp": stamp, "sha256": digest}}))
    return digest


def _read_cache() -> dict[str, dict[str, str]]:
    try:
        return json.loads(_DIGEST_CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

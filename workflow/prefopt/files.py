"""Texts, JSON and CSV as this project writes and reads them: whole or not at all, BadInput where they are damaged."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from prefopt.errors import BadInput
from prefopt.json_text import parsed_json
from prefopt.storage import write_whole


def write_text(path: Path, text: str, *, flush: bool = False) -> None:
    """Write a file so that it appears whole or not at all; ``flush``: and stays after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text, flush=flush)


def json_text(value: Any) -> str:
    """Indented JSON as files have it; NaN and infinity are refused, since they are no JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, *, flush: bool = False) -> None:
    """Write ``json_text`` as ``write_text`` does."""
    write_text(path, json_text(value), flush=flush)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSONL atomically."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_text(path: Path) -> str:
    """The text of a file that an artifact or a version-control tool keeps; BadInput names one that is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: no text in it ({error})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; BadInput names the file where it is missing or broken."""
    try:
        return parsed_json(read_text(path), finite=True)
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); remove the file and run again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSONL that ``write_lines`` wrote."""
    lines = read_text(path).split("\n")  # splitlines would cut texts at characters such as U+2028
    try:
        return [parsed_json(line) for line in lines if line]
    except ValueError as error:
        raise BadInput(f"{path}: not one JSON object per line ({error}); remove the folder and run again") from None


def read_rows(path: Path) -> list[list[str]]:
    """Read a CSV file as texts, the header first."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.reader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not CSV ({error}); remove the folder and run again") from None

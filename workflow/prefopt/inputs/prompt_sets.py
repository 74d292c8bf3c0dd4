"""Prompts without preferences: AlpacaEval's, files of the user, or a hub data set; with a baseline's outputs if any."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.inputs.containers import NumberedRow, dataset_rows, list_rows, open_path
from prefopt.inputs.hub import of_commit
from prefopt.inputs.sources import content_sha256
from prefopt.pairs import digest63
from prefopt.readers import find_reader, read_row
from prefopt.readers.raw import BadRow, Message, Refused, broken_at, require_unicode

if TYPE_CHECKING:
    import pandas as pd

COLUMN = "instruction"  # AlpacaEval's name of it
_WHOLE = re.compile(r"[0-9]{1,15}")
SET_COLUMNS = ("prompt_id", "prompt", "index", "dataset", "output", "source", "source_row")


@dataclass(frozen=True)
class PromptSet:
    """The prompts in the order of their source, and what was counted on the way.

    ``table`` has SET_COLUMNS; ``index`` is the row of the source, from 0; ``output`` is None where the row has none.
    ``repeated``: rows whose prompt stood before; ``refused``: reason -> rows that a reader of pairs could not use;
    ``generator``: whose the outputs are, or what the source is called.
    """

    table: pd.DataFrame
    repeated: int
    refused: dict[str, int]
    generator: str


def read_prompts(spec: Mapping[str, Any], path: Path | None = None) -> PromptSet:
    """The prompts of a set as ``sources.prompts_identity`` describes it; ``path`` is where a local file is.

    A prompt that stands in several rows counts once. Raises BadInput naming file and row for what is no prompt, where
    a local file is not the planned one, and where two rows give a prompt different outputs or name different models.
    """
    called, rows = _open(spec, path)
    collected = _Collected()
    for number, place, row in rows:
        where = f"{called}: {place}"
        try:
            messages = _messages(spec, row)
        except Refused as refusal:
            collected.refused[refusal.reason] += 1
            continue
        except BadRow as error:
            raise BadInput(f"{where}: {error}") from None
        record = {
            "prompt_id": digest63(messages),
            "prompt": messages,
            "index": _index(row, number, where),
            "dataset": _optional_text(row, "dataset", where) or "",
            "output": _optional_text(row, "output", where),
            "source": called,
            "source_row": number,
        }
        whose = None if record["output"] is None else _optional_text(row, "generator", where)
        collected.add(record, whose, where)
    return collected.whole(called)


@dataclass
class _Collected:
    """Rows of a prompt set as they come: each prompt once, each index one prompt's, outputs of one model."""

    records: dict[int, dict[str, Any]] = field(default_factory=dict)  # prompt_id -> its first row
    refused: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    generators: dict[str, str] = field(default_factory=dict)  # whose outputs -> the first row that says so
    numbers: dict[int, int] = field(default_factory=dict)  # index -> whose prompt

    def add(self, record: dict[str, Any], whose: str | None, where: str) -> None:
        """Take a row's prompt; BadInput for another prompt's index, and for a known prompt with another output."""
        if whose:
            self.generators.setdefault(whose, where)
        if self.numbers.setdefault(record["index"], record["prompt_id"]) != record["prompt_id"]:
            raise BadInput(f"{where}: 'index' is {record['index']}, as of another prompt before; each has its own")
        known = self.records.setdefault(record["prompt_id"], record)
        if known is not record:
            self.repeated += 1
            if known["output"] != record["output"]:
                raise BadInput(f"{where}: the same prompt as row {known['source_row'] + 1}, with another output")

    def whole(self, called: str) -> PromptSet:
        """All rows together; BadInput where there is no prompt, or outputs are of several models."""
        import pandas as pd

        refused = dict(self.refused)
        if not self.records:
            raise BadInput(f"{called}: no usable prompt" + (f" ({refused})" if refused else ": it has no rows"))
        if len(self.generators) > 1:
            (first, _), (second, where) = list(self.generators.items())[:2]
            raise BadInput(f"{where}: an output of '{second}', those before are of '{first}'; one model per file")
        table = pd.DataFrame(list(self.records.values()), columns=SET_COLUMNS)
        return PromptSet(table, self.repeated, refused, next(iter(self.generators), Path(called).name))


def _messages(spec: Mapping[str, Any], row: Any) -> list[Message]:
    if not isinstance(row, Mapping):
        raise BadRow(f"{type(row).__name__} where an object with keys is expected")
    reader = spec.get("reader")
    if reader is not None:
        return read_row(find_reader(reader, row), row).prompt
    column = spec.get("column") or COLUMN
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(map(str, row)) or "none"
        said = "no text" if column in row else "not there"
        raise BadRow(f"'{column}' is {said} (the row has the keys: {keys}); name another column, or a reader")
    require_unicode(text)
    return [{"role": "user", "content": text}]


def _index(row: Mapping[str, Any], number: int, where: str) -> int:
    """The row's own number where it says one, as AlpacaEval's extracts do; its place elsewhere."""
    index = row.get("index", number)
    whole = isinstance(index, int | str) and not isinstance(index, bool) and _WHOLE.fullmatch(str(index))
    if not whole:
        raise BadInput(f"{where}: 'index' is {index!r:.60}, expected a whole number from 0")
    return int(index)


def _optional_text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise BadInput(f"{where}: '{key}' is {type(value).__name__}, expected text")
    if value is not None and broken_at(value) is not None:
        raise BadInput(f"{where}: '{key}' has a lone surrogate at character {broken_at(value)}, which is no Unicode")
    return value


# --- where they are -------------------------------------------------------------------------------------------------


def _open(spec: Mapping[str, Any], path: Path | None) -> tuple[str, Iterable[NumberedRow]]:
    """What messages call the source, and its rows."""
    if spec["kind"] == "hub":
        return f"{spec['repo']}@{spec['revision'][:8]}/{spec['split']}", dataset_rows(_hub_rows(spec))
    if spec["kind"] == "hub_file":
        return f"{spec['repo']}@{spec['revision'][:8]}/{spec['file']}", _file_rows(_hub_file(spec))
    if path is None:
        raise BadInput("a prompt set of this machine without its file; plan again")
    if (found := content_sha256(path)) != spec["sha256"]:
        raise BadInput(f"{path}: sha256 is {found}, planned was {spec['sha256']}; restore the file, or plan again")
    return str(path), _file_rows(path)


def _file_rows(path: Path) -> Iterator[NumberedRow]:
    if path.name.endswith((".json", ".json.gz")):
        yield from list_rows(path)
        return
    for _, _, rows in open_path(path.name, path):
        yield from rows


def _hub_rows(spec: Mapping[str, Any]) -> Any:
    import datasets

    # data_files keeps the rest of a large repository where it is; all rows of the pattern are then one split
    options = {"data_files": {spec["split"]: spec["files"]}} if spec["files"] else {"name": spec["subset"]}
    try:
        rows = datasets.load_dataset(spec["repo"], split=spec["split"], revision=spec["revision"], **options)
        return of_commit(rows, spec["revision"])
    except Exception as error:  # the library's failures have no common base: network, cache, names, formats
        raise _not_fetched(spec, f"split '{spec['split']}'", error) from None


def _hub_file(spec: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(spec["repo"], spec["file"], repo_type="dataset", revision=spec["revision"])
    except Exception as error:  # as above
        raise _not_fetched(spec, spec["file"], error) from None
    return Path(found)


def _not_fetched(spec: Mapping[str, Any], what: str, error: Exception) -> BadInput:
    why = str(error).strip().splitlines() or [type(error).__name__]
    return BadInput(
        f"{spec['repo']} at {spec['revision'][:8]}, {what}: cannot be loaded ({why[0][:200]}); fetch it once "
        "where there is a network, or give its file with 'path'"
    )

"""Containers of the user's data: JSONL, CSV, parquet and saved data sets, row by row with the place of each row."""

from __future__ import annotations

import csv
import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.artifacts import tree_files
from prefopt.errors import BadInput, nearest
from prefopt.json_text import parsed_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"

NumberedRow = tuple[int, str, Any]  # 0-based number, where an editor shows it, content


def open_path(name: str, path: Path) -> Iterator[tuple[str, Path, Iterator[NumberedRow]]]:
    """The files of a path, each with its name, place and rows: one file, a saved data set, or a folder of files.

    Raises BadInput naming path and line for what is missing, of another kind, or not decodable.
    """
    if path.is_file():
        yield name, path, _file_rows(path)
    elif not path.is_dir():
        raise _missing(path)
    elif (path / _SAVED_SPLITS).is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise BadInput(f"{path}: a data set with the splits {', '.join(splits)}; give the path of one of these folders")
    elif (path / _SAVED_DATASET).is_file():
        yield name, path, dataset_rows(_load_saved(path))
    else:
        files = [p for p in tree_files(path) if p.name.endswith(SUFFIXES)]
        if not files:
            raise BadInput(f"{path}: no {', '.join(SUFFIXES)} file and no saved data set in this folder")
        for file in files:
            yield f"{name}/{file.relative_to(path).as_posix()}", file, _file_rows(file)


def dataset_rows(dataset: Any) -> Iterator[NumberedRow]:
    """Rows of a data set of the datasets library."""
    for number, row in enumerate(dataset):
        yield number, f"row {number + 1}", row


def _missing(path: Path) -> BadInput:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f"; {nearest(path.name, beside)}" if 0 < len(beside) <= 20 else ""
    return BadInput(f"{path}: no such file or folder{hint}")


def _load_saved(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # what the library raises for damaged files has no common base
        raise BadInput(f"{path}: not a data set as save_to_disk writes it ({error})") from None


def _file_rows(path: Path) -> Iterator[NumberedRow]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_rows(path)
    if path.name.endswith((".csv", ".csv.gz")):
        return csv_rows(path)
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    raise BadInput(f"{path}: unsupported kind of file '{path.suffix}'; supported: {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[str]:
    # Bytes are split before decoding, so that a wrong byte is told with its line.
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream):
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
                if "\0" in text:
                    raise BadInput(f"{path}: line {number + 1}: a byte 0x00, so it is no text; save the file as UTF-8")
                yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadInput(f"{path}: line {number + 1}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path}: cannot be read ({error}); is it a whole file of the kind its name says?")


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    for number, line in enumerate(_lines(path)):
        if not line.strip():
            continue
        try:
            row = parsed_json(line)
        except ValueError as error:
            raise BadInput(f"{path}: line {number + 1}: not JSON ({error}); one JSON object per line") from None
        yield number, f"line {number + 1}", row


def list_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of a JSON list of objects, plain or gzipped; BadInput where it is none."""
    try:
        content = path.read_bytes()
        rows = parsed_json(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise BadInput(f"{path}: not a JSON file ({error}); for one object per line call it .jsonl") from None
    if not isinstance(rows, list):
        raise BadInput(f"{path}: {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows):
        yield number, f"row {number + 1}", row


def csv_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of a CSV table, plain or gzipped, every value a text; BadInput names the line of what is none."""
    csv.field_size_limit(sys.maxsize)  # whole transcripts are longer than the module's default
    reader = csv.reader(_lines(path), strict=True)
    line = number = 0
    try:
        header = next(reader, [])
        repeated = [key for key, count in Counter(header).items() if count > 1]
        if repeated:
            raise BadInput(f"{path}: line 1: column '{repeated[0]}' stands twice")
        line = reader.line_num
        for fields in reader:
            start, line = line + 1, reader.line_num
            if not fields:
                continue
            if len(fields) != len(header):
                raise BadInput(f"{path}: line {start}: {len(fields)} fields, the header has {len(header)}")
            yield number, f"line {start}", dict(zip(header, fields, strict=True))
            number += 1
    except csv.Error as error:
        raise BadInput(f"{path}: line {line + 1}: not CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            repeated = [name for name, count in Counter(table.schema_arrow.names).items() if count > 1]
            if repeated:
                raise BadInput(f"{path}: column '{repeated[0]}' stands twice")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, f"row {number + 1}", row
                    number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: not a readable parquet file from row {number + 1} on ({error})") from None

"""The canonical pair table: the user's files, a hub data set or the demo world, read, checked and split by prompt."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.annotators.source import RawVotedPair, voted_outcomes, voted_pair
from prefopt.annotators.votes import Ballot, VotedPair
from prefopt.digests import canonical_json
from prefopt.errors import BadInput
from prefopt.inputs.containers import NumberedRow, dataset_rows, open_path
from prefopt.inputs.hub import of_commit
from prefopt.inputs.sources import content_sha256
from prefopt.readers import find_reader, read_row
from prefopt.readers.raw import BadRow, RawPair, Refused, checked_pair, meta_json
from prefopt.specs import DataSpec, FilesSource, HubSource, RatersSpec, SplitSpec, VotesSource, WorldSource

if TYPE_CHECKING:
    import pandas as pd

PAIR_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt",
    "chosen",
    "rejected",
    "split",
    "source",
    "source_row",
    "meta",
)
VOTE_COLUMNS = ("votes", "votes_chosen", "votes_rejected", "votes_tie")  # beside these, where people voted
HELD_OUT_COLUMNS = ("held_out_chosen", "held_out_rejected", "held_out_tie")  # and where some votes are held out
REFUSED_COLUMNS = ("source", "source_row", "reason", "detail")

Outcome = tuple[int, RawPair | Refused]


# --- identity -------------------------------------------------------------------------------------------------------


def digest63(value: Any) -> int:
    """First 63 bits of the sha256 of the canonical JSON of ``value``: a key that fits a signed 64-bit column."""
    return int.from_bytes(hashlib.sha256(canonical_json(value).encode()).digest()[:8]) >> 1


def split_of(prompt_id: int, splits: SplitSpec, split_seed: int) -> str:
    """The split of a prompt: u = 53 bits of sha256([split_seed, prompt_id]) in [0, 1) against the cumulative shares.

    In the order train, judge, validation, test: a share for validation takes prompts from test alone.
    """
    u = (digest63([split_seed, prompt_id]) >> 10) / 2**53
    if u < splits.train:
        return "train"
    if u < splits.train + splits.judge:
        return "judge"
    return "validation" if u < splits.train + splits.judge + splits.validation else "test"


def normal_prompt(prompt: Iterable[Mapping[str, str]]) -> int:
    """A key that prompts share which differ in case, spacing or compatible characters (Unicode NFKC) alone."""
    return digest63(
        [[turn["role"], " ".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split())] for turn in prompt]
    )


# --- the table ------------------------------------------------------------------------------------------------------


def build_pairs(data: DataSpec, data_root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a data declaration into (pairs, refused); columns are PAIR_COLUMNS and REFUSED_COLUMNS.

    A source of votes adds VOTE_COLUMNS: ``votes`` is JSON text, a list of {"annotator", "vote"} with vote chosen,
    rejected or tie, and the others are counts of them; with votes held out, HELD_OUT_COLUMNS count those.

    The split depends on the prompt and ``split_seed`` alone, so that no prompt is in two splits and no other row
    moves one. Of prompts that differ in case or spacing alone and fall into several splits, only those in the first of
    train, judge, validation and test are kept. Raises BadInput for input that cannot be read, and where a split with a
    share gets no pair.
    """
    import pandas as pd

    accepted, refused = read_source(data.source, data_root, data.limit)
    for record in accepted:
        record["split"] = split_of(record["prompt_id"], data.splits, data.split_seed)
    accepted, elsewhere = _each_in_one_split(accepted)
    refused += elsewhere
    by_raters = isinstance(data.source, WorldSource) and data.source.raters is not None
    voted: tuple[str, ...] = VOTE_COLUMNS if isinstance(data.source, VotesSource) or by_raters else ()
    if isinstance(data.source, VotesSource) and data.source.hold_out is not None:
        voted += HELD_OUT_COLUMNS
    pairs = pd.DataFrame(accepted, columns=[*PAIR_COLUMNS, *voted])
    for split, share in data.splits.model_dump().items():
        if share > 0 and not (pairs["split"] == split).any():
            prompts = pairs["prompt_id"].nunique()
            raise BadInput(
                f"split '{split}' (share {share:g}) got no pair out of {len(pairs)} with {prompts} prompts; "
                "give more prompts, or another share or split_seed"
            )
    return pairs, pd.DataFrame(refused, columns=REFUSED_COLUMNS)


def _each_in_one_split(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records whose prompt stands, up to case and spacing, in no earlier split; the others as refusals."""
    order = list(SplitSpec.model_fields)
    keys = [normal_prompt(record["prompt"]) for record in records]
    first: dict[int, int] = {}
    for key, record in zip(keys, records, strict=True):
        first[key] = min(first.get(key, len(order)), order.index(record["split"]))
    kept, refused = [], []
    for key, record in zip(keys, records, strict=True):
        if record["split"] == order[first[key]]:
            kept.append(record)
        else:
            detail = f"split {record['split']}, and up to case and spacing in split {order[first[key]]}"
            where = {name: record[name] for name in ("source", "source_row")}
            refused.append({**where, "reason": "prompt in another split", "detail": detail})
    return kept, refused


def read_source(
    source: WorldSource | FilesSource | VotesSource | HubSource, data_root: Path, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs and refusals of a source as records without a split; at most ``limit`` pairs from each file.

    Raises BadInput naming file, line and value where a row has not the reader's form, and where a file has no pair.
    """
    accepted: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, called, outcomes in _open_source(source, data_root):
        good, bad = _sort_out(name, outcomes, seen, limit)
        if not good:
            counts = Counter(record["reason"] for record in bad)
            told = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
            raise BadInput(f"{called}: no usable pair" + (f" ({told})" if told else ": it has no rows"))
        accepted += good
        refused += bad
    return accepted, refused


def summarise(pairs: pd.DataFrame, refused: pd.DataFrame) -> dict[str, Any]:
    """Counts for the summary table: pairs, prompts, by split, by source, and refusals by reason."""
    sources = sorted(set(pairs["source"]) | set(refused["source"]))
    return {
        "pairs": len(pairs),
        "prompts": int(pairs["prompt_id"].nunique()),
        "splits": {
            str(split): {"pairs": len(part), "prompts": int(part["prompt_id"].nunique())}
            for split, part in pairs.groupby("split")
        },
        "sources": {
            name: {
                "pairs": int((pairs["source"] == name).sum()),
                "refused": _counts(refused.loc[refused["source"] == name, "reason"]),
            }
            for name in sources
        },
        "refused": _counts(refused["reason"]),
    }


def _counts(reasons: pd.Series) -> dict[str, int]:
    return {str(reason): int(count) for reason, count in sorted(Counter(reasons).items())}


def _sort_out(
    name: str, outcomes: Iterable[Outcome], seen: set[int], limit: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    accepted: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for number, outcome in outcomes:
        if isinstance(outcome, RawPair):
            record = _record(name, number, outcome)
            if record["pair_id"] not in seen:
                seen.add(record["pair_id"])
                accepted.append(record)
                if len(accepted) == limit:
                    break
                continue
            outcome = Refused("duplicate pair")  # noqa: PLW2901 - the same row, seen before
        refused.append({"source": name, "source_row": number, "reason": outcome.reason, "detail": outcome.detail})
    return accepted, refused


def _record(name: str, number: int, pair: RawPair) -> dict[str, Any]:
    record = {
        "pair_id": digest63([pair.prompt, pair.chosen, pair.rejected]),
        "prompt_id": digest63(pair.prompt),
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "source": name,
        "source_row": number,
        "meta": meta_json(pair.meta),
    }
    return record | pair.vote_columns() if isinstance(pair, RawVotedPair) else record


# --- sources --------------------------------------------------------------------------------------------------------


def _open_source(
    source: WorldSource | FilesSource | VotesSource | HubSource, data_root: Path
) -> Iterator[tuple[str, str, Iterator[Outcome]]]:
    """Per file: its name in the table, how messages call it, its rows."""
    if isinstance(source, WorldSource):
        name = f"world-{source.domain}"
        yield name, name, _world_outcomes(source)
    elif isinstance(source, VotesSource):
        named = list(_pinned_paths(source, data_root))
        yield named[0][0], str(named[0][1]), voted_outcomes([path for _, path in named], source)
    elif isinstance(source, HubSource):
        name = f"{source.repo}@{source.revision[:8]}/{source.split}"
        yield name, name, _read_rows(name, dataset_rows(_load_hub(source)), source.reader)
    else:
        for name, path in _pinned_paths(source, data_root):
            for file_name, file, rows in open_path(name, path):
                yield file_name, str(file), _read_rows(str(file), rows, source.reader)


def _world_outcomes(source: WorldSource) -> Iterator[Outcome]:
    from prefopt.world import WorldParams, generate_pairs

    rows = generate_pairs(WorldParams(**source.model_dump(exclude={"kind", "raters"})))
    if source.raters is not None:
        yield from _voted_outcomes(source, source.raters, rows)
        return
    for number, row in enumerate(rows):
        prompt, chosen, rejected = (str(row[key]) for key in ("prompt", "chosen", "rejected"))
        extra = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
        try:
            yield number, checked_pair([{"role": "user", "content": prompt}], chosen, rejected, extra)
        except Refused as refusal:
            yield number, refusal


def _voted_outcomes(source: WorldSource, raters: RatersSpec, rows: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
    """The world's pairs as its named annotators vote on them."""
    from prefopt.world import Raters, cast_votes

    shown = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    votes = cast_votes(shown, Raters(**raters.model_dump()), seed=source.seed, domain=source.domain)
    for number, (row, cast) in enumerate(zip(rows, votes, strict=True)):
        ballots = tuple(Ballot(who, vote) for who, vote in cast)
        meta = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
        pair = VotedPair(row["prompt"], row["chosen"], row["rejected"], ballots, place=number, meta=meta)
        try:
            yield number, voted_pair(pair)
        except Refused as refusal:
            yield number, refusal


def _read_rows(called: str, rows: Iterable[NumberedRow], reader_name: str) -> Iterator[Outcome]:
    reader = None
    for number, place, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise BadRow(f"{type(row).__name__} where an object with keys is expected")
            reader = reader or find_reader(reader_name, row)
            outcome: RawPair | Refused = read_row(reader, row)
        except Refused as refusal:
            outcome = refusal
        except BadRow as error:
            raise BadInput(f"{called}: {place}: {error}") from None
        yield number, outcome


def _load_hub(source: HubSource) -> Any:
    import datasets

    try:
        rows = datasets.load_dataset(source.repo, name=source.subset, split=source.split, revision=source.revision)
        return of_commit(rows, source.revision)
    except Exception as error:  # the library's failures have no common base: network, cache, names, formats
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{source.repo} at {source.revision[:8]}, split '{source.split}': cannot be loaded ({why[0][:200]}); "
            "fetch it once where there is a network, or give its files as a source of kind files"
        ) from None


def _pinned_paths(source: FilesSource | VotesSource, data_root: Path) -> Iterator[tuple[str, Path]]:
    """Paths with their names below the folder they share, so that the table does not depend on where that is."""
    paths = [data_root / path for path in source.paths]
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    pins: Sequence[str | None] = source.sha256 or [None] * len(paths)
    if len(pins) != len(paths):
        raise BadInput(f"{len(pins)} sha256 for {len(paths)} paths; give one for every path, or none")
    for path, pin in zip(paths, pins, strict=True):
        if pin is not None and (found := content_sha256(path)) != pin.lower():
            raise BadInput(f"{path}: sha256 is {found}, pinned is {pin}; restore the file, or pin what is there now")
        yield path.absolute().relative_to(shared).as_posix(), path

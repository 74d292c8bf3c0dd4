"""Where a number comes from and where it goes: report, MLflow run, artifact, DVC hash and git commit, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt import tracking
from prefopt.errors import BadInput, nearest
from prefopt.evaluation.items import with_interval
from prefopt.files import read_json
from prefopt.redaction import redacted
from prefopt.reporting import revisions
from prefopt.reporting.addresses import Number, find_numbers, item_numbers
from prefopt.store.inventory import artifacts, below

SHOWN = 12  # artifacts or numbers of one kind before it is said how many more there are
HEX = re.compile(r"[0-9a-f]{6,64}(\.dir)?")


@dataclass
class Tracer:
    """A results folder with the checkout it lies in, looked up by any name that one of its things has."""

    results: Path
    current: Sequence[str] = ()  # stage/id of the items that the configuration asks for
    notes: list[str] = field(default_factory=list)

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Every artifact that is here."""
        return {ref: manifest for ref, manifest in artifacts(self.results).items() if manifest}

    @cached_property
    def items(self) -> dict[str, dict[str, Any]]:
        """Content of every finished item: stage/id -> item.json."""
        return {ref: read_json(self.results / ref / "item.json") for ref in self.manifests if ref.startswith("papers/")}

    @cached_property
    def checkout(self) -> Path | None:
        """The git checkout around the results folder."""
        return revisions.checkout_of(self.results.resolve())

    @cached_property
    def runs(self) -> list[dict[str, str]]:
        """Every run of the tracking store; none, with a note, where it cannot be reached."""
        try:
            return tracking.find_runs(self.results)
        except Exception as error:  # whatever a database driver or an HTTP client raises
            why = f"MLflow at {tracking.store_uri(self.results)} cannot be read: {' '.join(str(error).split())}"
            self.notes.append(redacted(why)[:300])
            return []

    def trace(self, name: str) -> dict[str, Any]:
        """What ``name`` is, as ``kind`` and what belongs to it; BadInput where nothing here has that name."""
        for find in (self._numbers, self._artifacts, self._run, self._hash, self._commit):
            if (found := find(name)) is not None:
                return found | {"asked": name, "notes": self.notes}
        if not self.manifests:
            raise BadInput(f"{self.results}: nothing is finished in there; run `make reproduce` or `dvc pull` first")
        known = [*self._item_names(), *(ref.rsplit("/", 1)[-1] for ref in self.manifests)]
        hint = nearest(name, known) if len(known) <= SHOWN or ":" in name or "-" in name else "try `prefopt plan`"
        raise BadInput(
            f"'{name}' is no number (paper/item:arm/metric), artifact, MLflow run, DVC hash or git commit of "
            f"{self.results}; {hint[:200]}"
        )

    def _item_names(self) -> dict[str, str]:
        """paper/item -> the item that stands for it: the configured one, else the last one made."""
        order = sorted(self.items, key=lambda ref: (ref in self.current, self.manifests[ref]["finished"]))
        return {f"{self.items[ref]['paper']}/{self.items[ref]['name']}": ref for ref in order}

    def _numbers(self, name: str) -> dict[str, Any] | None:
        """``paper/item`` or ``paper/item:part/part``: its numbers, and the artifacts behind them."""
        target, _, wanted = name.partition(":")
        ref = self._item_names().get(target)
        if ref is None:
            return None
        numbers = find_numbers(self.items[ref], wanted)
        sources = list(dict.fromkeys(source for number in numbers for source in number.sources))
        return {
            "kind": "number" if wanted else "item",
            "numbers": [_number(target, number) for number in numbers],
            "artifacts": [self._facts(r) for r in (ref, *(s for s in sources if s in self.manifests))],
            "absent": [source for source in sources if source not in self.manifests],
        }

    def _artifacts(self, name: str) -> dict[str, Any] | None:
        """An artifact by ``stage/id``, by its id, or by the beginning or the hex end of its id."""
        exact = [ref for ref in self.manifests if name in (ref, ref.rsplit("/", 1)[-1])]
        ids = {ref: ref.rsplit("/", 1)[-1] for ref in self.manifests}
        found = exact or [ref for ref, id_ in ids.items() if id_.endswith(f"-{name}") or ref.startswith(name)]
        found = found or [ref for ref, id_ in ids.items() if id_.startswith(name)]
        return self._of_artifacts("artifact", found) if found else None

    def _run(self, name: str) -> dict[str, Any] | None:
        """An MLflow run by its id; a place that only holds others is traced by the runs below it."""
        if not HEX.fullmatch(name):
            return None
        found = [run for run in self.runs if run["run_id"].startswith(name)]
        if not found:
            return None
        refs = [run["artifact"] for run in found if run["artifact"]]
        for run in found:
            if not run["artifact"]:
                inside = f"{run['key']}/", f"{run['key']}|"
                refs += [r["artifact"] for r in self.runs if r["artifact"] and r["key"].startswith(inside)]
        here = list(dict.fromkeys(ref for ref in refs if ref in self.manifests))
        absent = list(dict.fromkeys(ref for ref in refs if ref not in self.manifests))
        return self._of_artifacts("MLflow run", here) | {"runs": found, "absent": absent}

    def _hash(self, name: str) -> dict[str, Any] | None:
        """A DVC hash: of a folder that ``dvc.lock`` lists, or of a file in one."""
        if not HEX.fullmatch(name) or self.checkout is None:
            return None
        for out, md5 in revisions.dvc_outs(self.checkout).items():
            if md5.startswith(name):
                inside = [ref for ref in self.manifests if self._is_in(ref, out)]
                return self._of_artifacts("DVC output", inside) | {"out": out, "out_md5": md5} | self._recorded(md5)
        files = list(revisions.refs_with_md5(self.results, list(self.manifests), name))
        if files:
            found = self._of_artifacts("DVC file", list(dict.fromkeys(ref for ref, _ in files)))
            return found | {"files": [f"{ref}/{file}" for ref, file in files]}
        commits = revisions.recording_commits(self.checkout, name) if len(name) >= 32 else []
        if commits:
            text = revisions.file_at(self.checkout, commits[0], revisions.LOCK) or ""
            took = next((o for o, md5 in revisions.lock_outs(text).items() if md5.startswith(name)), None)
            return self._of_artifacts("DVC output of an earlier commit", []) | {"out": took, "recorded_by": commits}
        return None

    def _is_in(self, ref: str, out: str) -> bool:
        return self.checkout is not None and (self.results / ref).resolve().is_relative_to(
            (self.checkout / out).resolve()
        )

    def _recorded(self, md5: str) -> dict[str, Any]:
        return {"recorded_by": revisions.recording_commits(self.checkout, md5)}

    def _commit(self, name: str) -> dict[str, Any] | None:
        """A git commit: what was made with its code, and what its ``dvc.lock`` took up."""
        if self.checkout is not None:
            with suppress(BadInput):
                name = revisions.git(self.checkout, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
        if not HEX.fullmatch(name):
            return None
        made = [ref for ref, m in self.manifests.items() if (m["git"]["commit"] or "").startswith(name)]
        outs = self._taken_up(self.checkout, name) if self.checkout is not None and len(name) == 40 else {}
        return self._of_artifacts("git commit", made) | {"commit": name, "outs": outs} if made or outs else None

    @staticmethod
    def _taken_up(checkout: Path, commit: str) -> dict[str, str]:
        """Outputs whose hash in ``dvc.lock`` is new with this commit."""
        texts = [revisions.file_at(checkout, revision, revisions.LOCK) for revision in (f"{commit}^", commit)]
        before, after = (revisions.lock_outs(text or "") for text in texts)
        return {out: md5 for out, md5 in after.items() if before.get(out) != md5}

    def _of_artifacts(self, kind: str, refs: Sequence[str]) -> dict[str, Any]:
        shown = refs[:SHOWN]
        return {
            "kind": kind,
            "artifacts": [self._facts(ref) for ref in shown],
            "more": len(refs) - len(shown),
            "numbers": list(self._numbers_from(refs)),
        }

    def _numbers_from(self, refs: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Numbers that were computed from these artifacts; of what lies further below, the item by name."""
        wanted = set(refs)
        for target, item_ref in self._item_names().items():
            numbers = item_numbers(self.items[item_ref]).values()
            direct = [n for n in numbers if item_ref in wanted or wanted & set(n.sources)]
            if direct:
                yield from (_number(target, number) for number in direct)
            elif wanted & set(below(self.manifests, [item_ref])):
                yield {"address": target, "value": "made from it, through others"}

    def _facts(self, ref: str) -> dict[str, Any]:
        """One artifact with its names in MLflow, DVC and git."""
        manifest = self.manifests[ref]
        dvc = revisions.dvc_facts(self.results, ref)
        recorded = revisions.recording_commits(self.checkout, dvc["out_md5"]) if dvc["out_md5"] else []
        return {
            "artifact": ref,
            "made": manifest["finished"],
            "parents": list(manifest["parents"].values()),
            "runs": [run for run in self.runs if run["artifact"] == ref],
            "dvc": dvc,
            "git": manifest["git"] | {"recorded_by": recorded[-1] if recorded else None},
        }


def _number(target: str, number: Number) -> dict[str, Any]:
    return {"address": f"{target}:{number.address}", "value": with_interval(number.value, 4), **number.value}


def as_text(found: Mapping[str, Any]) -> str:
    """What ``Tracer.trace`` returned, for a terminal."""
    lines = [f"{found['asked']}: {found['kind']}"]
    numbers = found["numbers"]
    lines += [f"  number     {row['address']} = {row['value']}" for row in numbers[:SHOWN]]
    if len(numbers) > SHOWN:
        lines.append(f"             and {len(numbers) - SHOWN} more numbers (--json names all)")
    if found.get("out"):
        lines.append(f"  DVC out    {found['out']} {found.get('out_md5', '')}".rstrip())
    lines += [f"  DVC file   {name}" for name in found.get("files", [])[:SHOWN]]
    lines += [f"  DVC out    {out} {md5} taken up by this commit" for out, md5 in found.get("outs", {}).items()]
    lines += [f"  git        {commit[:12]} changed dvc.lock here" for commit in found.get("recorded_by", [])]
    for facts in found["artifacts"]:
        lines += _artifact_lines(facts)
    if found.get("more"):
        lines.append(f"  and {found['more']} more artifacts")
    lines += [f"  artifact   {ref}: not in this folder (dvc pull)" for ref in found.get("absent", [])]
    return "\n".join([*lines, *(f"  note       {note}" for note in found["notes"])])


def _artifact_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"  artifact   {facts['artifact']}"
    for run in facts["runs"]:
        yield f"    MLflow   {run['run_id']}  {run['key'].partition('|')[0]} / {run['name']}"
    if not facts["runs"]:
        yield "    MLflow   no run of its own"
    dvc, git = facts["dvc"], facts["git"]
    where = {True: "in", False: "not as in", None: "listing not in the cache:"}[dvc["recorded"]] if dvc["out"] else ""
    yield f"    DVC      {dvc['manifest_md5']} manifest.json " + (
        f"{where} {dvc['out']} {dvc['out_md5']}" if dvc["out"] else "not in dvc.lock"
    )
    made = (
        f"made with {git['commit'][:12]}{' and uncommitted changes' if git['dirty'] else ''}" if git["commit"] else ""
    )
    kept = f"recorded by {git['recorded_by'][:12]}" if git["recorded_by"] else ""
    yield f"    git      {', '.join(filter(None, (made, kept))) or 'made outside git'}"

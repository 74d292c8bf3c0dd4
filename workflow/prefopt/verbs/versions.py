"""The verbs about versions: ``trace``, ``compare``, ``gc``, ``publish``, and making damaged artifacts again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, node_of
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json, write_json, write_text
from prefopt.verbs.arguments import Verbs, add_configured, loaded_plan

PUBLISHED = "published.json"


def add_verbs(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Register the verbs; nothing heavy is imported before one of them runs."""
    text = "where a number, artifact, MLflow run, DVC hash or git commit comes from and where it went"
    trace = add_configured(verbs, common, "trace", text, _trace)
    trace.add_argument("name", metavar="X", help="paper/item, paper/item:arm/metric, or any id, hash or commit")
    trace.add_argument("--json", action="store_true", help="print one JSON object")

    text = "two versions of the items side by side: numbers with intervals, and what changed in their declarations"
    compare = verbs.add_parser("compare", parents=[common], help=text, description=text)
    compare.add_argument("revisions", nargs="*", metavar="REV", help="two git revisions; . is what lies here")
    compare.add_argument("--exported", default="docs/results", help="small results in git (default: %(default)s)")
    compare.add_argument("--results-a", type=Path, help="a results folder, instead of the first revision")
    compare.add_argument("--results-b", type=Path, help="a results folder, instead of the second revision")
    compare.add_argument("--items", default="*", help="comma-separated paper/item names or patterns")
    compare.add_argument("--metrics", help="comma-separated, instead of those that the items' claims name")
    compare.add_argument("--json", action="store_true", help="print one JSON object")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write it as one self-contained page")
    compare.set_defaults(run=_compare)

    text = "list what no declaration reaches: artifacts, their specs and logs, scratch of runs that are gone"
    collect = add_configured(verbs, common, "gc", text, _gc)
    collect.add_argument("--delete", action="store_true", help="remove it; without this it is only listed")
    collect.add_argument(
        "--also-config", type=Path, nargs="*", default=[], metavar="FILE", help="keep what these config files reach too"
    )
    collect.add_argument("--leave-out", default="", help="items that cannot be planned here and need not be kept")

    text = "import finished runs into MLflow; twice changes nothing"
    publish = add_configured(verbs, common, "publish", text, _publish)
    publish.add_argument(
        "manifests", type=Path, nargs="*", help="the items' manifest.json, instead of all finished ones"
    )
    publish.add_argument("--out", type=Path, help=f"what was published (default: {PUBLISHED} in the results folder)")
    publish.add_argument("--pending", action="store_true", help="only say what the last import could not deliver")
    text = "of policies: leave them where they are and log that, or put a copy into the artifact store"
    publish.add_argument("--weights", choices=("reference", "copy"), default="reference", help=text)


def finished_items(manifests: Sequence[Path]) -> tuple[Path, list[str]]:
    """The results folder and the ``stage/id`` of the items whose manifests were named."""
    nodes = {path: node_of(path) for path in manifests}
    for path, node in nodes.items():
        if not path.resolve().as_posix().endswith(f"/{node.ref}/{MANIFEST}"):
            raise BadInput(f"{path}: it says that it is of {node.ref}, which is not the folder that it lies in")
    roots = {path.resolve().parents[node.ref.count("/") + 1] for path, node in nodes.items()}
    if len(roots) != 1:
        raise BadInput(f"the manifests lie in several results folders: {', '.join(sorted(map(str, roots)))}")
    return roots.pop(), [node.ref for node in nodes.values()]


def _record(outcome: dict[str, Any]) -> dict[str, Any]:
    """What published.json says: the same for a second import, and for one on another machine."""
    uri = outcome["tracking_uri"]
    return {
        "published": sorted([*outcome["imported"], *outcome["unchanged"]]),
        "failed": sorted(outcome["failed"]),
        "warnings": outcome["warnings"],
        "store": "mlflow.db beside this file" if uri.startswith("sqlite:") else uri,
    }


def _pending(published: Path) -> None:
    """One line where the last import left something out; nothing where all is in the store, or none was tried."""
    record = read_json(published) if published.is_file() else {"failed": []}
    if record["failed"]:
        why = (record["warnings"] or [""])[0]
        print(f"{len(record['failed'])} runs are not in MLflow yet ({why}); later: python -m prefopt publish")


def _publish(arguments: argparse.Namespace) -> None:
    from prefopt.tracking import publish

    if arguments.pending:
        _pending(arguments.out or Path(loaded_plan(arguments).config.results) / PUBLISHED)
        return
    if arguments.manifests:
        results, refs = finished_items(arguments.manifests)
    else:
        plan = loaded_plan(arguments)
        results = Path(plan.config.results)
        refs = [node.ref for node in plan.items.values() if (results / node.ref / MANIFEST).is_file()]
        if not refs:
            raise BadInput(f"{results}: none of the configured items is finished; run `make reproduce` first")
    outcome = publish(results, refs, weights=arguments.weights)
    write_json(arguments.out or results / PUBLISHED, _record(outcome), flush=True)
    for warning in outcome["warnings"]:
        print(f"prefopt publish: {warning}", file=sys.stderr)
    done = f"MLflow: {len(outcome['imported'])} runs imported, {len(outcome['unchanged'])} unchanged"
    lost = f", {len(outcome['failed'])} not; once it is back: python -m prefopt publish" if outcome["failed"] else ""
    print(f"{done}{lost}")


def _trace(arguments: argparse.Namespace) -> None:
    from prefopt.reporting.trace import Tracer, as_text

    results, current = _results_and_items(arguments)
    found = Tracer(results, current).trace(arguments.name)
    print(json.dumps(found, ensure_ascii=False) if arguments.json else as_text(found))


def _results_and_items(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The results folder and the items of the configuration; where it cannot be planned, the folder alone."""
    try:
        plan = loaded_plan(arguments)
    except BadInput:
        from prefopt.planning.config import load_config

        given = {"results": arguments.results} if arguments.results else {}
        return Path(load_config(arguments.config, given).results), []
    return Path(plan.config.results), [node.ref for node in plan.items.values()]


def _compare(arguments: argparse.Namespace) -> None:
    from prefopt.reporting import versions

    folders = (arguments.results_a, arguments.results_b)
    asked = iter(arguments.revisions)
    if len(arguments.revisions) != sum(folder is None for folder in folders):
        raise BadInput("name two versions: two git revisions, or --results-a and --results-b, or one of each")
    one, other = (
        versions.in_results(folder)
        if folder is not None
        else versions.at_revision(_checkout(), next(asked), arguments.exported)
        for folder in folders
    )
    metrics = arguments.metrics.split(",") if arguments.metrics else None
    found = versions.compare_versions(one, other, arguments.items.split(","), metrics)
    if arguments.html is not None:
        from prefopt.reporting.versions_page import render_versions

        write_text(arguments.html, render_versions(found))
        print(f"page: {arguments.html}", file=sys.stderr)
    print(json.dumps(found, ensure_ascii=False) if arguments.json else versions.as_text(found))


def _checkout() -> Path:
    from prefopt.reporting.revisions import checkout_of

    checkout = checkout_of(Path.cwd())
    if checkout is None:
        raise BadInput(f"{Path.cwd()} is in no git checkout; compare results folders by --results-a and --results-b")
    return checkout


def remake(results: Path, damaged: Iterable[str]) -> None:
    """Remove damaged artifacts and what was made from them, and say so; the next run makes them again."""
    from prefopt.processes.launch import only_run, only_run_of
    from prefopt.store.inventory import remove_for_remake

    with only_run(), only_run_of(results):
        gone = remove_for_remake(results, damaged)
    print("\n".join(f"removed  {results / ref}" for ref in gone))
    print(f"{len(gone)} artifacts removed; the next `make reproduce` makes them again")


def _gc(arguments: argparse.Namespace) -> None:
    from prefopt.processes.launch import only_run, only_run_of
    from prefopt.store.inventory import remove, unreached

    results, wanted, unplanned = _reached(arguments)
    left_out = tuple(filter(None, arguments.leave_out.split(",")))
    unplanned = {name: why for name, why in unplanned.items() if not any(fnmatch(name, p) for p in left_out)}
    for name, why in unplanned.items():
        print(f"cannot tell what {name} reaches, its finished results are kept: {why}")
    found = unreached(results, wanted, list(unplanned))
    for name in found.running:
        print(f"in use   {results / name}")
    for name, size in found.artifacts.items():
        print(f"{_mb(size)}  {results / name}")
    if found.leftovers:
        print(f"{_mb(sum(found.leftovers.values()))}  {len(found.leftovers)} specs, logs and scratch folders of none")
    total = f"{len(found.artifacts)} artifacts that no declaration reaches, {found.size / 1e6:.1f} MB in all"
    if not arguments.delete:
        print(f"{total}; `python -m prefopt gc --delete` removes them")
        return
    if unplanned:
        names = ",".join(unplanned)
        raise FailedCheck(
            f"nothing removed: {names} cannot be planned here; say --data-root where their data are, or --leave-out "
            f"'{names}' where their unfinished parts may go"
        )
    with only_run(), only_run_of(results):
        remove(results, unreached(results, wanted))
    print(f"{total}: removed")


def _mb(size: int) -> str:
    return f"{size / 1e6:9.2f} MB"


def _reached(arguments: argparse.Namespace) -> tuple[Path, set[str], dict[str, str]]:
    """Results folder, everything that any declaration beside the config files reaches, and items without a plan.

    All declared items count, also those that ``items:`` does not name, each in its quick part and in full.
    """
    from prefopt.planning.config import load_config

    given: dict[str, Any] = {"data_root": arguments.data_root, "results": arguments.results}
    given = {key: value for key, value in given.items() if value is not None}
    wanted: set[str] = set()
    unplanned: dict[str, str] = {}
    for config in [arguments.config, *arguments.also_config]:
        for name in _declared(config, arguments.items):
            try:
                wanted |= _refs(config, name, given)
            except BadInput as error:
                unplanned[name] = str(error)
    return Path(load_config(arguments.config, given).results), wanted, unplanned


def _declared(config: Path, items: str | None) -> list[str]:
    """paper/item of every declaration beside a config file, or of those that ``items`` names."""
    files = sorted((config.parent / "experiments").glob("*/*.yaml"))
    names = [f"{path.parent.name}/{path.stem}" for path in files]
    patterns = items.split(",") if items else ["*"]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _refs(config: Path, item: str, given: dict[str, Any]) -> set[str]:
    from prefopt.plan import load_plan

    return {ref for full in (False, True) for ref in load_plan(config, {**given, "items": item, "full": full}).nodes}

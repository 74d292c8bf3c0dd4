"""The verbs before and after a run: ``plan``, ``launch``, ``verify``, ``report`` and ``export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefopt.errors import FailedCheck
from prefopt.verbs import versions
from prefopt.verbs.arguments import Verbs, add_configured, loaded_plan


def add_verbs(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Register the verbs; nothing heavy is imported before one of them runs."""
    text = "show what will run, what is there already, and what the rest will cost"
    plan = add_configured(verbs, common, "plan", text, _plan)
    plan.add_argument("names", nargs="*", metavar="ITEM", help="paper/item names or patterns, as in --items")
    plan.add_argument("--list", action="store_true", help="every artifact, instead of sums by stage")
    plan.add_argument("--gpu", metavar="NAME[:N]", help="hours, memory and fit on GPUs, such as h100:8")

    text = "run Snakemake, one run at a time, its jobs forked from a process that has imported torch"
    start = verbs.add_parser("launch", parents=[common], help=text, description=text)
    start.add_argument("command", nargs="+", metavar="COMMAND", help="for example: -- snakemake --cores 2")
    start.add_argument("--logs", type=Path, default=Path("results/logs"), help="where jobs log (default: %(default)s)")
    start.set_defaults(run=_launch)

    text = "re-check every artifact against its manifest and its parents"
    verify = add_configured(verbs, common, "verify", text, _verify)
    text = "remove the damaged ones and what was made from them, so that the next run makes them again"
    verify.add_argument("--remake", action="store_true", help=text)

    text = "write one self-contained HTML page about finished items"
    report = verbs.add_parser("report", parents=[common], help=text, description=text)
    text = "results/papers/<paper>/<id>/manifest.json of the items"
    report.add_argument("manifests", type=Path, nargs="+", help=text)
    report.add_argument("--out", type=Path, required=True, help="the file to write, in the results folder")
    report.set_defaults(run=_report)

    text = "copy finished items' small results into a folder for git"
    export = add_configured(verbs, common, "export", text, _export)
    export.add_argument("--out", type=Path, default=Path("docs/results"), help="default: %(default)s")
    export.add_argument("--readme", type=Path, help="also renew the table of results in this file")


def _plan(arguments: argparse.Namespace) -> None:
    from prefopt.planning.machines import parsed_gpus
    from prefopt.planning.text import plan_lines

    if arguments.names:
        arguments.items = ",".join([*arguments.names, *([arguments.items] if arguments.items else [])])
    gpus = parsed_gpus(arguments.gpu) if arguments.gpu else None
    print("\n".join(plan_lines(loaded_plan(arguments), gpus, arguments.list)))


def _launch(arguments: argparse.Namespace) -> None:
    from prefopt.processes.launch import launch

    sys.exit(launch(arguments.command, arguments.logs))


def _verify(arguments: argparse.Namespace) -> None:
    from prefopt.store.inventory import damaged

    plan = loaded_plan(arguments)
    results = Path(plan.config.results)
    nodes = plan.reachable(plan.items.values())
    found = damaged(results, nodes)
    lines = [line for findings in found.values() for line in findings]
    print("\n".join(lines) if lines else f"{len(nodes)} artifacts are what their manifests say")
    if not found:
        return
    if arguments.remake:
        versions.remake(results, found)
        return
    raise FailedCheck(
        f"{len(lines)} findings in {len(found)} of {len(nodes)} artifacts; `python -m prefopt verify --remake` removes "
        "those and what was made from them, the next run makes them again"
    )


def _report(arguments: argparse.Namespace) -> None:
    from prefopt.files import write_text
    from prefopt.report import collect_report
    from prefopt.reporting.report_page import render_report

    results, refs = versions.finished_items(arguments.manifests)
    html = render_report(collect_report(results, refs))
    write_text(arguments.out, html, flush=True)
    print(f"report: {arguments.out} ({len(html) / 1e6:.1f} MB)")


def _export(arguments: argparse.Namespace) -> None:
    from prefopt.reporting.exports import export_items, update_readme
    from prefopt.reporting.paper_metrics import write_paper_metrics

    plan = loaded_plan(arguments)
    refs = {name: node.ref for name, node in plan.items.items()}
    write_paper_metrics(arguments.out, export_items(Path(plan.config.results), refs, arguments.out))
    print(f"{len(refs)} items exported to {arguments.out}")
    if arguments.readme is not None:
        changed = update_readme(arguments.readme, arguments.out)
        print(f"{arguments.readme}: {'table of results renewed' if changed else 'table of results as it was'}")

"""The verbs ``win-rate``, as a stage and of a judge's own file, and ``show-answers``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefopt.errors import BadInput
from prefopt.stages import Stage
from prefopt.verbs import jobs
from prefopt.verbs.arguments import Verbs, add_beside_annotations, annotation_options


def add_win_rate(verbs: Verbs, common: argparse.ArgumentParser, stage: Stage) -> None:
    """The stage's verb, which also takes a judge's own file."""
    verb = jobs.add_verb(verbs, common, stage, spec_required=False)
    files = verb.add_argument_group("instead of --spec", "win rates, also length-controlled, of a judge's own file")
    files.add_argument("--annotations", type=Path, help="AlpacaEval's annotations, .json or .csv, also with .gz")
    add_beside_annotations(files)
    files.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(run=_win_rate)


def _win_rate(arguments: argparse.Namespace) -> None:
    if (arguments.spec is None) == (arguments.annotations is None):
        raise BadInput("give either --spec, for a stage of the workflow, or --annotations, for a judge's file")
    options = annotation_options(arguments)
    if arguments.spec is not None:
        extra = [name for name, value in (options | {"json": arguments.json}).items() if value]
        if extra:
            raise BadInput(f"--{extra[0].replace('_', '-')} goes with --annotations, not with --spec")
        jobs.run(arguments)
        return
    from prefopt.stages.annotated import win_rates_of

    metrics = win_rates_of(arguments.annotations, **options)
    if arguments.json:
        print(json.dumps(metrics, ensure_ascii=False))
        return
    for model in metrics["models"].values() if "models" in metrics else [metrics]:
        print("\n".join(f"{name:27} {value}" for name, value in model.items()), end="\n\n")


def add_show_answers(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb that writes a page; nothing heavy is imported before it runs."""
    text = "write one HTML page of win rates, figures, and every prompt with both answers and the verdict"
    verb = verbs.add_parser("show-answers", parents=[common], help=text, description=text)
    text = "AlpacaEval's annotations or the judge stage's, .json or .csv, also with .gz"
    verb.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help=text)
    add_beside_annotations(verb)
    verb.add_argument("--out", type=Path, required=True, help="the page to write")
    verb.set_defaults(run=_show_answers)


def _show_answers(arguments: argparse.Namespace) -> None:
    from prefopt.files import write_text
    from prefopt.reporting.evaluation_page import render_page
    from prefopt.stages.shown import evaluations_of

    options = annotation_options(arguments)
    html = render_page(evaluations_of(arguments.annotations, **options))
    write_text(arguments.out, html)
    print(f"answers: {arguments.out} ({len(html.encode('utf-8')) / 1e6:.1f} MB)")

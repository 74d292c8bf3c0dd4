"""The command line: one verb per stage, and verbs to plan, verify and look things up.

Exit codes: 0 done, 2 bad input, 3 a check failed, 75 try again (a checkpoint is there), 130 stopped from the keyboard.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt import __version__, parallel, team, warm
from prefopt.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    AlreadyMade,
    BadInput,
    FailedCheck,
    PrefoptError,
    nearest,
    one_line,
)
from prefopt.redaction import RedactingFormatter, redacted
from prefopt.shares import check_divisible, has_divisible_rows
from prefopt.stages import STAGES, RunOptions, Stage, rankings, versions, votes_file
from prefopt.storage import told

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan

log = logging.getLogger("prefopt")

_ANNOTATED_FILES = {
    "outputs": "model_outputs of the model, for lengths",
    "baseline": "model_outputs of the baseline, for lengths and prompt numbers",
    "difficulty": "table of index and instruction_difficulty",
    "gamed": "comparisons of the baseline with its verbose and concise selves",
}

_GROUPS = {
    "Before and after a run": ("plan", "launch", "verify", "report", "export"),
    "What changed, what came from where": ("compare", "trace", "publish", "gc"),
    "Your own evaluation files": (
        "win-rate",
        "show-answers",
        "rank",
        "compare-policies",
        "fit-difficulty",
        "disagreement",
    ),
    "Lists": ("losses", "studies", "schema"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; failures a user can act on end as one line on stderr and an exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(_overview(_parser()))
        return EXIT_DONE
    parser = _parser()
    if (wrong := _no_verb(parser, argv[0])) is not None:
        print(wrong, file=sys.stderr)
        return EXIT_BAD_INPUT
    arguments = parser.parse_args(argv)
    alone = arguments.verb in STAGES and arguments.spec is not None and parallel.launched() == 1
    if alone and (code := warm.run_in_server(argv)) is not None:
        return code
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print(f"prefopt {arguments.verb}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        failure = error if isinstance(error, PrefoptError) else told(error, _subject(arguments))
        if failure is None or arguments.debug:
            raise
        print(redacted(f"prefopt {arguments.verb}{parallel.label()}: {one_line(failure)}"), file=sys.stderr)
        return failure.exit_code
    return EXIT_DONE


def _subject(arguments: argparse.Namespace) -> object:
    """What a command works on, for failures that name no file: its spec, else the folder that it was started in."""
    spec = getattr(arguments, "spec", None)
    return (spec[0] if isinstance(spec, list) else spec) or Path.cwd()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefopt", description="Reproducible study of preference optimization.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    for stage in STAGES.values():
        _add_stage(verbs, common, stage)
    text = "show what will run, what is there already, and what the rest will cost"
    plan = _add_configured(verbs, common, "plan", text, _plan)
    plan.add_argument("names", nargs="*", metavar="ITEM", help="paper/item names or patterns, as in --items")
    plan.add_argument("--list", action="store_true", help="every artifact, instead of sums by stage")
    plan.add_argument("--gpu", metavar="NAME[:N]", help="hours, memory and fit on GPUs, such as h100:8")
    text = "re-check every artifact against its manifest and its parents"
    verify = _add_configured(verbs, common, "verify", text, _verify)
    text = "remove the damaged ones and what was made from them, so that the next run makes them again"
    verify.add_argument("--remake", action="store_true", help=text)
    export = _add_configured(
        verbs, common, "export", "copy finished items' small results into a folder for git", _export
    )
    export.add_argument("--out", type=Path, default=Path("docs/results"), help="default: %(default)s")
    export.add_argument("--readme", type=Path, help="also renew the table of results in this file")
    _add_over_items(verbs, common, "report", "write one self-contained HTML page about finished items", _report)
    versions.add_verbs(verbs, common, partial(_add_configured, verbs, common), _loaded_plan)
    _add_show_answers(verbs, common)
    rankings.add_verbs(verbs, common)
    votes_file.add_verb(verbs, common)
    text = "run Snakemake, one run at a time, its jobs forked from a process that has imported torch"
    start = verbs.add_parser("launch", parents=[common], help=text, description=text)
    start.add_argument("command", nargs="+", metavar="COMMAND", help="for example: -- snakemake --cores 2")
    start.add_argument("--logs", type=Path, default=Path("results/logs"), help="where jobs log (default: %(default)s)")
    start.set_defaults(run=_launch)
    losses = verbs.add_parser("losses", parents=[common], help="list the losses, their parameters and needs")
    losses.add_argument("--page", type=Path, help="instead renew the tables of this page, such as docs/methods.md")
    losses.set_defaults(run=_losses)
    studies = verbs.add_parser("studies", parents=[common], help="list the exact studies and their parameters")
    studies.set_defaults(run=_studies)
    schema = verbs.add_parser("schema", parents=[common], help="write the JSON schemas that editors complete from")
    schema.add_argument("--out", type=Path, default=Path("workflow/schemas"), help="folder (default: %(default)s)")
    schema.set_defaults(run=_schema)
    return parser


def _no_verb(parser: argparse.ArgumentParser, word: str) -> str | None:
    """What to say where the first word is no verb: argparse would list all of them."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if word.startswith("-") or word in verbs.choices:
        return None
    return f"prefopt: no verb {word!r:.60}; {nearest(word, verbs.choices)}"


def _overview(parser: argparse.ArgumentParser) -> str:
    """All verbs in groups, with a line of help each; headings are bold on a terminal that has not said NO_COLOR."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = {choice.dest: choice.help or "" for choice in verbs._choices_actions}
    named = {name for names in _GROUPS.values() for name in names}
    groups = _GROUPS | {"Also": tuple(name for name in texts if name not in named and name not in STAGES)}
    groups |= {"One stage each, as the workflow's jobs call them": tuple(name for name in STAGES if name not in named)}
    bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    lines = ["usage: python -m prefopt VERB ..., and python -m prefopt VERB --help"]
    for heading, names in groups.items():
        there = [name for name in names if name in texts]
        if there:
            lines += ["", f"\033[1m{heading}\033[0m" if bold else heading]
            lines += [f"  {name:22} {texts[name]}" for name in there]
    return "\n".join(lines)


def _add_stage(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser, stage: Stage) -> None:
    defaults = RunOptions()
    verb = verbs.add_parser(stage.verb, parents=[common], help=stage.help, description=stage.help)
    annotated = stage.verb == "win-rate"
    several = {"nargs": "+"} if stage.several else {}
    text = f"results/specs/{stage.folder}/<id>.json{', or several' if several else ''}"
    verb.add_argument("--spec", type=Path, required=not annotated, help=text, **several)
    if "micro_batch" in stage.options:
        verb.add_argument("--micro-batch", type=_count, default=defaults.micro_batch, help="rows in memory at a time")
    if "checkpoint_steps" in stage.options:
        text = "steps between checkpoints"
        verb.add_argument("--checkpoint-steps", type=_count, default=defaults.checkpoint_steps, help=text)
    if "gradient_checkpointing" in stage.options:
        text = "run layers again in the backward pass: less memory, more time"
        verb.add_argument("--gradient-checkpointing", action="store_true", help=text)
    if "compile" in stage.options:
        verb.add_argument("--compile", action="store_true", help="run layers through torch.compile: pays in long runs")
    if "sharding" in stage.options:
        text = "full: weights, gradients and optimiser state divided among processes that torchrun started"
        verb.add_argument("--sharding", choices=("none", "full"), default=defaults.sharding, help=text)
    if "processes" in stage.options:
        text = "processes that share the rows, each with a whole model on a GPU of its own"
        verb.add_argument("--processes", type=_count, default=defaults.processes, help=text)
    if "device" in stage.options:
        verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default=defaults.device)
    if annotated:
        _add_annotated(verb)
    verb.set_defaults(run=_win_rate if annotated else _run_stage)


def _add_annotated(verb: argparse.ArgumentParser) -> None:
    files = verb.add_argument_group("instead of --spec", "win rates, also length-controlled, of a judge's own file")
    files.add_argument("--annotations", type=Path, help="AlpacaEval's annotations, .json or .csv, also with .gz")
    _add_beside_annotations(files)
    files.add_argument("--json", action="store_true", help="print one JSON object")


def _add_beside_annotations(files: argparse._ActionsContainer) -> None:
    for name, text in _ANNOTATED_FILES.items():
        files.add_argument(f"--{name}", type=Path, help=text)
    files.add_argument(
        "--by-position", action="store_true", help="number prompts by their row, as published figures do"
    )


def _add_show_answers(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    text = "write one HTML page of win rates, figures, and every prompt with both answers and the verdict"
    verb = verbs.add_parser("show-answers", parents=[common], help=text, description=text)
    text = "AlpacaEval's annotations or the judge stage's, .json or .csv, also with .gz"
    verb.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help=text)
    _add_beside_annotations(verb)
    verb.add_argument("--out", type=Path, required=True, help="the page to write")
    verb.set_defaults(run=_show_answers)


def _count(text: str) -> int:
    """A whole number of at least one, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _add_configured(
    verbs: argparse._SubParsersAction, common: argparse.ArgumentParser, name: str, text: str, run: object
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, parents=[common], help=text, description=text)
    verb.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="default: %(default)s")
    verb.add_argument("--items", help="comma-separated paper/item names or patterns, instead of the config file's")
    verb.add_argument("--data-root", help="folder that data paths are relative to, instead of the config file's")
    verb.add_argument("--results", help="results folder, instead of the config file's")
    verb.add_argument("--full", action="store_true", default=None, help="grids in full, not their quick part")
    verb.set_defaults(run=run)
    return verb


def _add_over_items(
    verbs: argparse._SubParsersAction, common: argparse.ArgumentParser, name: str, text: str, run: object
) -> None:
    verb = verbs.add_parser(name, parents=[common], help=text, description=text)
    verb.add_argument("manifests", type=Path, nargs="+", help="results/papers/<paper>/<id>/manifest.json of the items")
    verb.add_argument("--out", type=Path, required=True, help="the file to write, in the results folder")
    verb.set_defaults(run=run)


def _run_stage(arguments: argparse.Namespace) -> None:
    for spec in arguments.spec if STAGES[arguments.verb].several else [arguments.spec]:
        _make(arguments, spec)


def _make(arguments: argparse.Namespace, spec: Path) -> None:
    """Run the stage over one spec file."""
    from prefopt.artifacts import node_of, results_of

    stage = STAGES[arguments.verb]
    node = node_of(spec)
    if node.stage.split("/", maxsplit=1)[0] != stage.folder:
        raise FailedCheck(f"{spec}: a spec of '{node.stage}', which '{stage.verb}' does not make")
    options = RunOptions(**{name: getattr(arguments, name) for name in stage.options})
    build = partial(_build, stage, node, results_of(spec), options)
    check_divisible(node, options.processes)
    try:
        if has_divisible_rows(node):
            team.run(options.processes, build)
        else:
            build()
    except AlreadyMade as made:
        log.info("%s: %s", stage.verb, made)
        return
    log.info("%s: done, see %s", stage.verb, results_of(spec) / node.ref)


def _build(stage: Stage, node: Node, results: Path, options: RunOptions) -> None:
    if team.size() > 1:
        parallel.take_gpu(team.rank(), options.device)
    with (
        parallel.started(stage.verb, several="sharding" in stage.options, device=options.device),
        parallel.building_together(node, results) as build,
    ):
        stage.load()(build, options)
        if team.size() > 1:
            build.summary |= {"processes": team.size()}


def _win_rate(arguments: argparse.Namespace) -> None:
    if (arguments.spec is None) == (arguments.annotations is None):
        raise BadInput("give either --spec, for a stage of the workflow, or --annotations, for a judge's file")
    options = {name: getattr(arguments, name) for name in (*_ANNOTATED_FILES, "by_position")}
    if arguments.spec is not None:
        extra = [name for name, value in (options | {"json": arguments.json}).items() if value]
        if extra:
            raise BadInput(f"--{extra[0].replace('_', '-')} goes with --annotations, not with --spec")
        _run_stage(arguments)
        return
    from prefopt.stages.annotated import win_rates_of

    metrics = win_rates_of(arguments.annotations, **options)
    if arguments.json:
        print(json.dumps(metrics, ensure_ascii=False))
        return
    for model in metrics["models"].values() if "models" in metrics else [metrics]:
        print("\n".join(f"{name:27} {value}" for name, value in model.items()), end="\n\n")


def _show_answers(arguments: argparse.Namespace) -> None:
    from prefopt.evaluation_page import render_page
    from prefopt.files import write_text
    from prefopt.stages.shown import evaluations_of

    options = {name: getattr(arguments, name) for name in (*_ANNOTATED_FILES, "by_position")}
    html = render_page(evaluations_of(arguments.annotations, **options))
    write_text(arguments.out, html)
    print(f"answers: {arguments.out} ({len(html.encode('utf-8')) / 1e6:.1f} MB)")


def _loaded_plan(arguments: argparse.Namespace) -> Plan:
    from prefopt.plan import load_plan

    given = {name: getattr(arguments, name) for name in ("items", "data_root", "results", "full")}
    return load_plan(arguments.config, {key: value for key, value in given.items() if value is not None})


def _plan(arguments: argparse.Namespace) -> None:
    from prefopt.machines import parsed_gpus
    from prefopt.plan_text import plan_lines

    if arguments.names:
        arguments.items = ",".join([*arguments.names, *([arguments.items] if arguments.items else [])])
    gpus = parsed_gpus(arguments.gpu) if arguments.gpu else None
    print("\n".join(plan_lines(_loaded_plan(arguments), gpus, arguments.list)))


def _export(arguments: argparse.Namespace) -> None:
    from prefopt.exports import export_items, update_readme
    from prefopt.paper_metrics import write_paper_metrics

    plan = _loaded_plan(arguments)
    refs = {name: node.ref for name, node in plan.items.items()}
    write_paper_metrics(arguments.out, export_items(Path(plan.config.results), refs, arguments.out))
    print(f"{len(refs)} items exported to {arguments.out}")
    if arguments.readme is not None:
        changed = update_readme(arguments.readme, arguments.out)
        print(f"{arguments.readme}: {'table of results renewed' if changed else 'table of results as it was'}")


def _verify(arguments: argparse.Namespace) -> None:
    from prefopt.inventory import damaged

    plan = _loaded_plan(arguments)
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
    from prefopt.report_page import render_report

    results, refs = versions.finished_items(arguments.manifests)
    html = render_report(collect_report(results, refs))
    write_text(arguments.out, html, flush=True)
    print(f"report: {arguments.out} ({len(html) / 1e6:.1f} MB)")


def _losses(arguments: argparse.Namespace) -> None:
    from prefopt.losses import COMPOSITIONS, LOSSES
    from prefopt.methods_page import page_with_tables, parameters_text, procedure_parameters, steps_text
    from prefopt.procedures import PROCEDURES

    if arguments.page is not None:
        from prefopt.files import read_text, write_text

        write_text(arguments.page, page_with_tables(read_text(arguments.page)))
        print(f"{arguments.page}: tables of methods and steps renewed")
        return
    for name, loss in LOSSES.items():
        needs = ", ".join(sorted(loss.needs)) or "nothing"
        print(f"{name:26} {parameters_text(loss)}\n{'':26} needs {needs}; {steps_text(loss.combination)}")
        print(f"{'':26} {loss.paper} {loss.equation}")
    for name, (base, regulariser) in COMPOSITIONS.items():
        print(f"{name:26} = {base}" + (f" with {json.dumps(regulariser)}" if regulariser else ""))
    for kind, found in PROCEDURES.items():
        print(f"{'rounds: ' + kind:26} {procedure_parameters(found)}\n{'':26} {found.paper} {found.equation}")


def _studies(arguments: argparse.Namespace) -> None:
    from prefopt.studies import STUDIES

    for name, study in STUDIES.items():
        print(f"{name:26} {study.about}\n{'':26} {', '.join(study.parameters()) or 'no parameters'}")


def _launch(arguments: argparse.Namespace) -> None:
    from prefopt.launch import launch

    sys.exit(launch(arguments.command, arguments.logs))


def _schema(arguments: argparse.Namespace) -> None:
    from prefopt.files import write_text
    from prefopt.schema import schemas

    for name, text in schemas().items():
        write_text(arguments.out / name, text)
        print(arguments.out / name)

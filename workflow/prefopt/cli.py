"""The command line: one verb per stage, and verbs to plan, verify and look things up (``prefopt.verbs``).

Exit codes: 0 done, 2 bad input, 3 a check failed, 75 try again (a checkpoint is there), 130 stopped from the keyboard.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from prefopt import __version__
from prefopt.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, PrefoptError, nearest, one_line
from prefopt.processes import parallel
from prefopt.redaction import RedactingFormatter, redacted
from prefopt.stages import STAGES
from prefopt.storage import told
from prefopt.verbs import evaluation, jobs, lists, rankings, runs, stored, versions, votes_file

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
        print(_overview(parser()))
        return EXIT_DONE
    verbs = parser()
    if (wrong := _no_verb(verbs, argv[0])) is not None:
        print(wrong, file=sys.stderr)
        return EXIT_BAD_INPUT
    arguments = verbs.parse_args(argv)
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


@cache
def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; nothing heavy is imported for it."""
    made = argparse.ArgumentParser(prog="prefopt", description="Reproducible study of preference optimization.")
    made.add_argument("--version", action="version", version=__version__)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    for stage in STAGES.values():
        add = evaluation.add_win_rate if stage.verb == "win-rate" else jobs.add_verb
        add(verbs, common, stage)
    runs.add_verbs(verbs, common)
    versions.add_verbs(verbs, common)
    evaluation.add_show_answers(verbs, common)
    rankings.add_verbs(verbs, common)
    votes_file.add_verb(verbs, common)
    stored.add_verbs(verbs, common)
    lists.add_verbs(verbs, common)
    return made


def _no_verb(made: argparse.ArgumentParser, word: str) -> str | None:
    """What to say where the first word is no verb: argparse would list all of them."""
    (verbs,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
    if word.startswith("-") or word in verbs.choices:
        return None
    return f"prefopt: no verb {word!r:.60}; {nearest(word, verbs.choices)}"


def _overview(made: argparse.ArgumentParser) -> str:
    """All verbs in groups, with a line of help each; headings are bold on a terminal that has not said NO_COLOR."""
    (verbs,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
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

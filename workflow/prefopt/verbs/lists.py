"""The verbs ``losses``, ``studies`` and ``schema``: what there is, for people and for editors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefopt.verbs.arguments import Verbs


def add_verbs(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Register the verbs; nothing heavy is imported before one of them runs."""
    losses = verbs.add_parser("losses", parents=[common], help="list the losses, their parameters and needs")
    losses.add_argument("--page", type=Path, help="instead renew the tables of this page, such as docs/methods.md")
    losses.set_defaults(run=_losses)
    studies = verbs.add_parser("studies", parents=[common], help="list the exact studies and their parameters")
    studies.set_defaults(run=_studies)
    schema = verbs.add_parser("schema", parents=[common], help="write the JSON schemas that editors complete from")
    schema.add_argument("--out", type=Path, default=Path("workflow/schemas"), help="folder (default: %(default)s)")
    schema.set_defaults(run=_schema)


def _losses(arguments: argparse.Namespace) -> None:
    from prefopt.losses import COMPOSITIONS, LOSSES
    from prefopt.procedures import PROCEDURES
    from prefopt.reporting.methods_page import page_with_tables, parameters_text, procedure_parameters, steps_text

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


def _schema(arguments: argparse.Namespace) -> None:
    from prefopt.files import write_text
    from prefopt.planning.schema import schemas

    for name, text in schemas().items():
        write_text(arguments.out / name, text)
        print(arguments.out / name)

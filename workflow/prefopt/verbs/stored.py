"""The verbs of a run whose results lie in a storage: ``stored``, which a job there runs in, and ``unpack``."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from prefopt.artifacts import node_of, results_of
from prefopt.processes.warm import outlive
from prefopt.store.bundles import store_of, unpack, unpack_from, write_bundle
from prefopt.store.verification import verify_artifact

log = logging.getLogger("prefopt")


def add_verbs(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Register the two verbs."""
    text = "run a stage's command where only bundles of its parents are, and leave a bundle of its artifact"
    stored = verbs.add_parser("stored", parents=[common], help=text, description=text)
    stored.add_argument("--spec", type=Path, required=True, help="results/specs/<stage>/<id>.json of the artifact")
    text = "<stage>/<id>.tar to write; the parents' bundles lie beside it as <stage>/<id>.tar"
    stored.add_argument("--bundle", type=Path, required=True, help=text)
    stored.add_argument("command", nargs="+", metavar="COMMAND", help="for example: -- python -m prefopt tokenize ...")
    stored.set_defaults(run=_stored)
    text = "put artifacts, and all that they were made from, from their bundles into a results folder"
    open_up = verbs.add_parser("unpack", parents=[common], help=text, description=text)
    open_up.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="<stage>/<id>.tar")
    open_up.add_argument("--results", type=Path, required=True, help="the results folder")
    open_up.set_defaults(run=lambda given: unpack(given.bundles, given.results))


def _stored(arguments: argparse.Namespace) -> None:
    """An artifact that lies in the results folder whole, such as one whose upload was cut off, is not made again."""
    node, results = node_of(arguments.spec), results_of(arguments.spec)
    unpack_from(store_of(arguments.bundle, node.ref), node.parents.values(), results)
    if verify_artifact(results, node):
        code = outlive(subprocess.Popen(arguments.command))
        if code:
            sys.exit(code if code > 0 else 128 - code)
    else:
        log.info("%s: lies in %s as its manifest says; it is stored and not made again", node.ref, results)
    write_bundle(results, node.ref, arguments.bundle)

"""``graphsplit inspect``."""

from __future__ import annotations

from graphsplit.cli import console
from graphsplit.cli.common import Asked, Entry, Inputs, Json, OptionalK, Outputs, Target, Verbose, open_either
from graphsplit.report import model_report


def inspect(
    target: Target,
    k: OptionalK = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the units of a model: what is coupled, what is shared, and what cannot be split, and why.

    Nothing is written.
    """
    opened = open_either(Asked(target, k, entry, inputs, keep_output, allow_meta=True), console.Progress())
    report = model_report(opened.partition.analysis)
    if as_json:
        console.json({"origin": opened.origin, **report})
    else:
        console.model(report, opened.origin)

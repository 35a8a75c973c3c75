"""``graphsplit inspect``."""

from __future__ import annotations

from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Fit,
    Inputs,
    Json,
    OptionalK,
    Outputs,
    Seed,
    Shares,
    Strategy,
    Target,
    Verbose,
    Who,
)
from graphsplit.cli.opening import Asked, Options, open_width, parse_shares
from graphsplit.report import model_report


def inspect(
    target: Target,
    k: OptionalK = None,
    shares: Shares = None,
    strategy: Strategy = Who.contiguous,
    fit: Fit = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    seed: Seed = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the units of a model: what is coupled, what is shared, and what cannot be split, and why.

    Nothing is written.
    """
    options = Options(parse_shares(shares), strategy, fit, seed=seed)
    meta = strategy is not Who.cluster  # which looks at the weights
    opened = open_width(
        Asked(target, k, entry, inputs, keep_output, allow_meta=meta), console.Progress(), options
    )
    report = model_report(opened.partition.analysis)
    if as_json:
        console.json({"origin": opened.origin, **report})
    else:
        console.model(report, opened.origin)

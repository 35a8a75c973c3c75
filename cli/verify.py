"""``graphsplit verify``."""

from __future__ import annotations

from graphsplit.cli import console
from graphsplit.cli.common import Entry, Inputs, Json, OptionalK, Outputs, Target, Verbose
from graphsplit.cli.opening import Asked, open_any
from graphsplit.errors import VerificationError


def verify(
    target: Target,
    k: OptionalK = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prove a partition: of a model, or of a bundle with the weights that it holds; layer groups likewise.

    The exit code is 7 where a check fails.
    """
    progress = console.Progress()
    opened = open_any(Asked(target, k, entry, inputs, keep_output), progress)
    with progress.step("verify"):
        certificate = opened.verify()
    data = certificate.to_data()
    if as_json:
        console.json({**opened.facts, "certificate": data, "timings": progress.timings})
    else:
        console.say(opened.words)
        console.certificate(data)
        console.timings(progress.timings)
    if not certificate.ok:
        raise VerificationError("a check of the certificate failed", hint="please report it with the model")

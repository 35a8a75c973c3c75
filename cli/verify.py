"""``graphsplit verify``."""

from __future__ import annotations

from graphsplit._api import partition
from graphsplit._layer_groups import LayerGroups
from graphsplit.bundle import DepthBundle
from graphsplit.cli import console
from graphsplit.cli.common import (
    Asked,
    Entry,
    Inputs,
    Json,
    Opened,
    OptionalK,
    Outputs,
    Target,
    Verbose,
    open_model,
    open_partition,
    read_any,
)
from graphsplit.errors import VerificationError
from graphsplit.verification import Certificate


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
    asked = Asked(target, k, entry, inputs, keep_output)
    if asked.is_bundle:
        bundle = read_any(asked, progress)
        if isinstance(bundle, DepthBundle) and k is None:
            _verify_groups(bundle, target, progress, as_json=as_json)
            return
        opened = open_partition(asked, bundle, progress)
    else:
        opened = open_model(asked, progress)
    with progress.step("verify"):
        certificate = _certificate(opened)
    data = certificate.to_data()
    plan = opened.partition.plan
    if as_json:
        console.json({"origin": opened.origin, "model": plan.model, "k": plan.k, "certificate": data,
                      "timings": progress.timings})  # fmt: skip
    else:
        console.say(f"{plan.model} from {opened.origin}, into {plan.k} sub-models")
        console.certificate(data)
        console.timings(progress.timings)
    if not certificate.ok:
        raise VerificationError("a check of the certificate failed", hint="please report it with the model")


def _verify_groups(bundle: DepthBundle, target: str, progress: console.Progress, *, as_json: bool) -> None:
    with progress.step("verify"):
        certificate = LayerGroups.from_bundle(bundle).verify()
    data = certificate.to_data()
    if as_json:
        console.json({"origin": target, "model": bundle.plan.model, "n": bundle.plan.n, "certificate": data,
                      "timings": progress.timings})  # fmt: skip
    else:
        console.say(f"{bundle.plan.model} from {target}, in {bundle.plan.n} layer groups")
        console.certificate(data)
        console.timings(progress.timings)
    if not certificate.ok:
        raise VerificationError("a check of the certificate failed", hint="please report it with the model")


def _certificate(opened: Opened) -> Certificate:
    """The source of a bundle has no weights: the plain merge of those of the sub-models stands in for it."""
    divided = opened.partition
    if opened.states is None:
        return divided.verify()
    full = divided.merged_program(opened.states, duplicate=False)
    return partition(full, plan=divided.plan).verify(opened.states)

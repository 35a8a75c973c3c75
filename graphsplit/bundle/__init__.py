"""`save` and `load`: what graphsplit makes as a folder of JSON and safetensors.

Layout::

    manifest.json            format, tools, what is where, certificate, size and sha256 of every file
    plan.json                the partition plan, or the depth plan
    source.graph.json        a program without its tensors (also program.*, submodel_0.*, group_0.*,
                             member_0.*, merged.*)
    source.safetensors       its tensors by name; none where all are on the meta device
    masks.safetensors        masks on weights, and scores.safetensors by which they were chosen
    anything.onnx            further files, as they were given

A folder is written beside its place, forced to disk, and renamed into it, so that a reader finds the old
bundle or the new one. It is read only after the manifest and then the size and digest of every file were
found right. Nothing is pickled and no code in a bundle is run. The same object gives the same bytes.
"""

from graphsplit.bundle.content import MANIFEST
from graphsplit.bundle.kinds import (
    Bundle,
    DepthBundle,
    EnsembleBundle,
    FusedBundle,
    MaskBundle,
    PartitionBundle,
    PrunedBundle,
    Saved,
)
from graphsplit.bundle.programs import program_of, without_weights
from graphsplit.bundle.store import load, save

__all__ = [
    "MANIFEST",
    "Bundle",
    "DepthBundle",
    "EnsembleBundle",
    "FusedBundle",
    "MaskBundle",
    "PartitionBundle",
    "PrunedBundle",
    "Saved",
    "load",
    "program_of",
    "save",
    "without_weights",
]

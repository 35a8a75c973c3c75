"""The rewrites: one pass a file, and the pipeline that runs them."""

from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.passes.dead_code_elimination import DeadCodeElimination
from graphsplit.passes.fuse import Fuse
from graphsplit.passes.layer_groups import LayerGroups, Recompose
from graphsplit.passes.merge import Merge
from graphsplit.passes.partition import Partition
from graphsplit.passes.pipeline import PASSES, Pipeline, Timing
from graphsplit.passes.prune_units import PruneUnits
from graphsplit.passes.sparsify import Sparsify
from graphsplit.passes.unstack import Unstack
from graphsplit.passes.widen import Widen

__all__ = [
    "PASSES",
    "DeadCodeElimination",
    "Fuse",
    "LayerGroups",
    "Merge",
    "Partition",
    "Pass",
    "PassResult",
    "Pipeline",
    "Programs",
    "PruneUnits",
    "Recompose",
    "Sparsify",
    "Timing",
    "Unstack",
    "Widen",
]

"""graphsplit: a compiler that splits neural networks."""

from graphsplit import data, errors, train
from graphsplit._api import Partition, draw, export_onnx, load, partition, save
from graphsplit._ensemble import ensemble
from graphsplit._fuse import FusedModule, fuse
from graphsplit._layer_groups import LayerGroups, layer_groups
from graphsplit._local_critics import LocalCritics, local_critics
from graphsplit._prune_units import PrunedUnits, prune_units
from graphsplit._sparsify import Masks, sparsify
from graphsplit._study import Study, study
from graphsplit._synthetic_halves import SyntheticHalves, synthetic_halves
from graphsplit.emission import ProgramModule, emit
from graphsplit.ensembles import Ensemble
from graphsplit.loading import load_model
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program
from graphsplit.tracing import trace
from graphsplit.verification import Certificate

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Ensemble",
    "FusedModule",
    "LayerGroups",
    "LocalCritics",
    "Masks",
    "Partition",
    "PartitionPlan",
    "Program",
    "ProgramModule",
    "PrunedUnits",
    "Study",
    "SyntheticHalves",
    "data",
    "draw",
    "emit",
    "ensemble",
    "errors",
    "export_onnx",
    "fuse",
    "layer_groups",
    "load",
    "load_model",
    "local_critics",
    "partition",
    "prune_units",
    "save",
    "sparsify",
    "study",
    "synthetic_halves",
    "trace",
    "train",
]

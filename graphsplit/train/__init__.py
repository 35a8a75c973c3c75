"""Training apart: sub-models to merge, layer groups with critics, replicas whose ensemble is compressed.

Miranda & Von Zuben, "Reducing the Training Time of Neural Networks by Partitioning", arXiv 1511.02954.
"""

from graphsplit.train.admm import ADMM, ADMMStep
from graphsplit.train.descent import SufficientDescent
from graphsplit.train.ensembles import EnsembleCompression
from graphsplit.train.history import Epoch, History
from graphsplit.train.local import LocalEpoch, LocalLosses
from graphsplit.train.logs import CSVLog, TensorBoardLog
from graphsplit.train.loop import Batches, evaluate, fit, misclassified
from graphsplit.train.methods import JointLosses, SyntheticGradients
from graphsplit.train.per_model import PerModelAdamW, PerModelSGD
from graphsplit.train.rounds import EnsembleTrained, Round
from graphsplit.train.schedule import PartitionSchedule, Trained
from graphsplit.train.sharding import ShardSampler
from graphsplit.train.stage import Recipe
from graphsplit.train.synthetic import Labels

__all__ = [
    "ADMM",
    "ADMMStep",
    "Batches",
    "CSVLog",
    "EnsembleCompression",
    "EnsembleTrained",
    "Epoch",
    "History",
    "JointLosses",
    "Labels",
    "LocalEpoch",
    "LocalLosses",
    "PartitionSchedule",
    "PerModelAdamW",
    "PerModelSGD",
    "Recipe",
    "Round",
    "ShardSampler",
    "SufficientDescent",
    "SyntheticGradients",
    "TensorBoardLog",
    "Trained",
    "evaluate",
    "fit",
    "misclassified",
]

"""Pre-training by partition: sub-models apart, merged with their optimizer states, then the whole model.

Miranda & Von Zuben, "Reducing the Training Time of Neural Networks by Partitioning", arXiv 1511.02954.
"""

from graphsplit.train.admm import ADMM, ADMMStep
from graphsplit.train.descent import SufficientDescent
from graphsplit.train.history import Epoch, History
from graphsplit.train.local import LocalEpoch, LocalLosses
from graphsplit.train.loop import Batches, evaluate, fit, misclassified
from graphsplit.train.methods import JointLosses, SyntheticGradients
from graphsplit.train.per_model import PerModelAdamW, PerModelSGD
from graphsplit.train.schedule import PartitionSchedule, Trained
from graphsplit.train.stage import Recipe
from graphsplit.train.synthetic import Labels

__all__ = [
    "ADMM",
    "ADMMStep",
    "Batches",
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
    "SufficientDescent",
    "SyntheticGradients",
    "Trained",
    "evaluate",
    "fit",
    "misclassified",
]

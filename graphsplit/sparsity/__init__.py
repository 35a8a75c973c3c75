"""Sparse at initialisation: which weights matter before training, and masks that keep those."""

from graphsplit.sparsity.masks import SCOPES, Scope, cut_layers, top_k
from graphsplit.sparsity.prunable import prunable
from graphsplit.sparsity.scores import DATA_FREE, METHODS, Method, Scoring, choose

__all__ = [
    "DATA_FREE",
    "METHODS",
    "SCOPES",
    "Method",
    "Scope",
    "Scoring",
    "choose",
    "cut_layers",
    "prunable",
    "top_k",
]

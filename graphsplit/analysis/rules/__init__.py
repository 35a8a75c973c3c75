"""Rules of unit inference, one family a file. Importing this package registers them.

To add a rule, write a function of ``(inference, node)`` that returns `Facts`, decorate it with
``@rule("op.overload")`` and, if the op has sizes among its arguments, add a localizer in
`graphsplit.analysis.localize`.
"""

from graphsplit.analysis.rules import (
    attention,
    contraction,
    convolution,
    embedding,
    indexing,
    normalization,
    pointwise,
    pooling,
    recurrent,
    reduction,
    scattering,
    shape,
    spectral,
)

__all__ = [
    "attention",
    "contraction",
    "convolution",
    "embedding",
    "indexing",
    "normalization",
    "pointwise",
    "pooling",
    "recurrent",
    "reduction",
    "scattering",
    "shape",
    "spectral",
]

"""Fourier transforms: along dimensions without units; along units each sub-model transforms its own."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference
from graphsplit.analysis.rules.reduction import mixed_along
from graphsplit.graphs import base_name, node_arg

# Ops of which the result is as long as the operand.
SAME_LENGTH = {"fft_fft", "fft_ifft", "fft_fft2", "fft_ifft2", "fft_fftn", "fft_ifftn"}


@rule(
    *(f"fft_{name}.default" for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")),
    *(f"fft_{name}.default" for name in ("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2")),
    *(f"fft_{name}.default" for name in ("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn")),
    "fft_fftshift.default", "fft_ifftshift.default",
)  # fmt: skip
def transform(inference: Inference, node: fx.Node) -> Facts:
    """``y = F(x)`` along some dimensions, linear in ``x``."""
    x = node_arg(node)
    name = base_name(node)
    rank = len(inference.shape(x))
    shifts = name.endswith("shift")
    size = None if shifts else argument(node, 1, "s" if name[-1] in "2n" else "n")
    default: Any = [-2, -1] if name.endswith("2") else None if shifts or name.endswith("n") else -1
    given = argument(node, 1 if shifts else 2, "dim", default)
    if given is None:
        count = rank if size is None else len(size)
        given = list(range(rank - count, rank))
    dims = [dim % rank for dim in ([given] if isinstance(given, int) else given)]
    if name in SAME_LENGTH and size is None:
        return mixed_along(inference, x, dims, linear=True)
    factors, lost = inference.hold(x, dims)
    return Facts(factors, linear=(x,), whole=f"{name} along units" if lost else None)

"""Data parallelism of sparse models: processes send the gradients of kept weights and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphsplit.errors import PlanError


@dataclass
class KeptEntries:
    """A communication hook of ``DistributedDataParallel`` that sends only the kept entries of gradients.

    What is masked has no gradient on any process, so that the averages are those of the plain hook.

    Attributes:
        masks: By the name of the parameter that holds the weights.
        sent: Bytes that this process has handed over so far.
        dense: Bytes that it would have without the hook.
    """

    masks: Mapping[str, Tensor]
    sent: int = 0
    dense: int = 0
    _masks_of: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _places: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def saved(self) -> float:
        """Share of the bytes that was not sent."""
        return 1 - self.sent / self.dense if self.dense else 0.0

    def register(self, model: DistributedDataParallel) -> None:
        """Make a model use it.

        Raises:
            PlanError: The model lacks one of the parameters.
        """
        named = dict(model.module.named_parameters())
        for name, mask in self.masks.items():
            if name not in named or named[name].shape != mask.shape:
                raise PlanError(f"the model has no parameter {name} of shape {list(mask.shape)}")
            self._masks_of[id(named[name])] = mask
        # torch looks at the annotations of a hook, and takes none that are text.
        model.register_comm_hook(None, lambda _, bucket: self.average(bucket))

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average one bucket of gradients."""
        buffer = bucket.buffer()
        places = self._kept(bucket, buffer)
        kept = buffer[places].div_(dist.get_world_size())
        self.sent += kept.numel() * kept.element_size()
        self.dense += buffer.numel() * buffer.element_size()
        work = dist.all_reduce(kept, async_op=True)
        assert work is not None

        def spread(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            return buffer.zero_().index_copy_(0, places, done.value()[0])

        found: torch.futures.Future[Tensor] = work.get_future().then(spread)
        return found

    def _kept(self, bucket: dist.GradBucket, buffer: Tensor) -> Tensor:
        """Places of the kept entries in the flat buffer of a bucket."""
        parameters = bucket.parameters()
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._places:
            flags = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
            for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
                start = gradient.storage_offset() - buffer.storage_offset()
                mask = self._masks_of.get(id(parameter))
                own = True if mask is None else mask.reshape(-1).to(buffer.device)
                flags[start : start + gradient.numel()] = own
            self._places[key] = flags.nonzero()[:, 0]
        return self._places[key]


def parallel(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[DistributedDataParallel, KeptEntries]:
    """A pruned model under ``DistributedDataParallel`` with the hook, on this process's device.

    Args:
        model: With masks on it, as ``Masks.apply`` leaves it.
        masks: The same on all processes, by the name of the parameter.
    """
    still = [name for name, _ in model.named_buffers() if name.endswith("_mask")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, still)
    wrapped = DistributedDataParallel(model)
    hook = KeptEntries({f"{name}_orig": mask for name, mask in masks.items()})
    hook.register(wrapped)
    return wrapped, hook

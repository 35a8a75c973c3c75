"""What torch.export would lose without a word: hooks, changed flags, transforms, modes that write."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphsplit.errors import TraceError, UnsupportedError
from graphsplit.program import source_of
from graphsplit.untouched import copies_of, set_tensors, tensors_of, untouched

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
_PACKING = {"pack_padded_sequence", "pad_packed_sequence", "pack_sequence"}
_TRANSFORMS = tuple(f"/torch/_functorch/{name}.py" for name in ("apis", "eager_transforms", "vmap"))
_ASIDE = "take it off while the model is traced, and put it on the modules that are made"


def user_frames(frames: Sequence[traceback.FrameSummary]) -> Sequence[traceback.FrameSummary]:
    """Frames of code that is neither torch's nor ours."""
    return [f for f in frames if "/torch/" not in f.filename and "/graphsplit/" not in f.filename]


def place(frames: Sequence[traceback.FrameSummary]) -> str | None:
    """File, line and code of the innermost frame."""
    if not frames:
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`"


def refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks on the gradients of modules and parameters by name: torch.export drops them."""
    for name, module in model.named_modules():
        for kind, hooks in (("", module._backward_hooks), ("pre_", module._backward_pre_hooks)):
            if hooks:
                raise TraceError(
                    f"{name or 'the model'} has a backward hook (register_full_backward_{kind}hook), "
                    "which torch.export loses",
                    hint=_ASIDE,
                )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise TraceError(
                f"the parameter {name} has a hook on its gradient, which torch.export loses", hint=_ASIDE
            )


def refuse_modes_that_write(model: nn.Module) -> None:
    """Where ``train()`` or ``eval()`` adds one weight to another, the modes have models of other weights."""
    for path, module in model.named_modules():
        if type(module).train is nn.Module.train and type(module).eval is nn.Module.eval:
            continue
        with untouched(module):
            own, copies = tensors_of(module), copies_of(module)
            set_tensors(module, copies)
            for mode in (not module.training, module.training):
                module.train(mode)
                for name, tensor in copies.items():
                    if not tensor.is_meta and not torch.equal(tensor.detach(), own[name].detach()):
                        raise UnsupportedError(
                            f"{type(module).__name__}.train({mode}) writes to {name}",
                            where=f"module {path}" if path else None,
                            hint="switch it off (loralib: merge_weights=False), or merge weights for good",
                        )


@contextmanager
def gradients_as_computed(model: nn.Module) -> Iterator[None]:
    """Refuse that forward puts hooks on gradients of tensors, or changes which parameters have some."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tensor: Any = Tensor
    kept = {name: tensor.__dict__[name] for name in _HOOKS if name in tensor.__dict__}

    def refusal(name: str) -> Any:
        def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            frames = traceback.extract_stack()
            raise TraceError(
                f"the model calls Tensor.{name} in forward, which torch.export loses",
                where=place(user_frames(frames)),
                hint="write what it does to the gradient with ordinary ops, such as "
                "2 * x.detach() - x for a gradient of the other sign",
            )

        return refuse

    for name in kept:
        setattr(tensor, name, refusal(name))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(tensor, name, original)
    for name, parameter in model.named_parameters():
        if flags.get(name, parameter.requires_grad) != parameter.requires_grad:
            raise TraceError(
                f"forward changes requires_grad of the parameter {name}, which torch.export loses",
                hint="do this outside of forward, or use the parameter's detach() in forward",
            )


@contextmanager
def custom_functions_refused() -> Iterator[None]:
    """Refuse custom `torch.autograd.Function` by name: torch.export silently drops their backward."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(
            f"the model calls the custom torch.autograd.Function {cls.__name__}, "
            "whose backward torch.export loses",
            where=place(user_frames(traceback.extract_stack())),
            hint="write it with ordinary ops, register it by torch.library.custom_op with a backward, "
            "or for checkpointing use use_reentrant=False",
        )

    function.apply = classmethod(refuse)
    try:
        yield
    finally:
        function.apply = original


def refuse_transforms(graphs: Sequence[fx.Graph]) -> None:
    """Refuse `torch.vmap` and `torch.func`: what torch.export leaves of them runs nowhere else."""
    for graph in graphs:
        for node in graph.nodes:
            if getattr(node.target, "__module__", "").startswith("torch._functorch"):
                called = "torch.vmap" if "batch_dim" in node.name else "a transform of torch.func"
                raise TraceError(
                    f"the model calls {called}, which torch.export cannot take apart",
                    where=str(source_of(node)),
                    hint="write it with ops on the whole batch",
                )


def way_out(model: nn.Module, error: Exception) -> str:
    """What a user can do where torch.export gives up."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames]
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "a part of the model is a TorchScript module: give the Python module that it was made from"
    if any(file.endswith(_TRANSFORMS) for file in files):
        return "write what a transform of torch.func does with ordinary ops, or move it out of forward"
    if any(frame.name in _PACKING or "packed" in (frame.line or "") for frame in frames):
        return (
            "packed sequences have sizes that depend on values: run the layer on padded sequences, and leave "
            "out what lies beyond the lengths in the loss, or by a mask"
        )
    return (
        "control flow that depends on tensor values has to become torch.where or torch.cond, "
        "or move out of the part to be split"
    )

"""State dicts as safetensors files, checked against a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphsplit.cli.common import in_place_of
from graphsplit.errors import BundleError, PlanError
from graphsplit.plan import PartitionPlan, StatePlan


def read_states(plan: PartitionPlan, paths: Sequence[Path]) -> list[dict[str, Tensor]]:
    """State dicts of the K sub-models, by the first name of each tensor.

    Raises:
        BundleError: A file cannot be read.
        PlanError: The number of files, a name or a shape does not fit.
    """
    if len(paths) != plan.k:
        raise PlanError(
            f"{len(paths)} weight file{'' if len(paths) == 1 else 's'} for {plan.k} sub-models",
            hint="give one safetensors file for each sub-model, in their order",
        )
    return [_read_state(plan, part, path) for part, path in enumerate(paths)]


def _read_state(plan: PartitionPlan, part: int, path: Path) -> dict[str, Tensor]:
    tensors = read(path)
    known = {name for state in plan.state for name in (state.name, *state.aliases)}
    foreign = [name for name in tensors if name not in known and not _is_index(name)]
    if foreign:
        raise PlanError(
            f"{path} holds {foreign[0]}, which the plan does not know",
            hint="these weights belong to another model",
        )
    needed = [state for state in plan.state if state.kind != "constant" and state.persistent]
    return {state.name: _fitting(plan, state, part, path, tensors) for state in needed}


def _is_index(name: str) -> bool:
    """Tables that stand beside the weights in the files of a bundle."""
    return name.startswith("_indices_")


def _fitting(
    plan: PartitionPlan, state: StatePlan, part: int, path: Path, tensors: Mapping[str, Tensor]
) -> Tensor:
    found = [tensors[name] for name in (state.name, *state.aliases) if name in tensors]
    if not found:
        raise PlanError(f"{path} lacks {state.name}", hint="these weights belong to another model")
    shape, wanted = tuple(found[0].shape), state.local_shape(part)
    if shape != wanted:
        others = [other for other in range(plan.k) if shape == state.local_shape(other)]
        hint = "these weights belong to another model or another plan"
        if shape == state.shape:
            hint = "these are the weights of the full model"
        elif others:
            hint = f"sub-model {others[0]} has that shape: are the files in the order of the sub-models?"
        raise PlanError(f"{state.name} in {path} has shape {shape}, the plan says {wanted}", hint=hint)
    return found[0]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if not path.is_file():
        raise BundleError(f"there is no file {path}", hint="give a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        hint = "write it by safetensors.torch.save_file(model.state_dict(), path)"
        raise BundleError(f"{path} is no safetensors file, or damaged: {error}", hint=hint) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, all of it or nothing. Tied tensors are written under each of their names."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous().clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    with in_place_of(path) as beside:
        save_file(apart, beside)

"""Laws of units and of passes, on models of every family.

*Exchange*: two units of one axis, swapped in every tensor that the plan couples them in, change nothing. *Isolation*:
what happens in one sub-model stays there. Passes leave their input alone, give the same twice, and give well-formed
programs.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import graphsplit as gs
from graphsplit.analysis import analyse
from graphsplit.passes import Merge, Partition, Programs
from graphsplit.program import check
from laws import (
    Runner,
    Units,
    assert_same_step,
    axes_of,
    largest_difference,
    perturbed,
    program_unchanged,
    random_states,
    random_values,
    step,
    tensors,
)
from zoo import ZOO, call_of, traced

EQUAL = 1e-10
DIFFERENT = 1e-8


def inputs_of(name: str) -> list[Tensor]:
    return tensors(call_of(name))


# Number of axes whose units can be exchanged, of all axes: the others meet an input or a table element-wise.
AXES = {
    "lenet": (3, 3),
    "mlp_batchnorm_dropout": (2, 2),
    "resnet_bottleneck": (14, 14),
    "resnext": (9, 9),
    "densenet": (12, 12),
    "shufflenet_v2": (14, 14),
    "mobilenet_v3": (8, 8),
    "convnext": (5, 5),
    "unet": (12, 12),
    "vit": (5, 5),
    "swin": (8, 8),
    "gpt": (5, 5),
    "llama_expand": (5, 5),
    "llama_complex_rotary": (5, 5),
    "encoder_decoder": (6, 6),
    "lstm": (2, 2),
    "gru_bidirectional": (2, 2),
    "state_space": (4, 4),
    "glu": (3, 3),
    "hub_bert": (6, 6),
}

# Tensors that an output does not depend on: a softmax over keys does not see what is added to all of them.
INERT = ("linears.1.bias", "key.bias")


def pairs_of(axis: Units) -> list[tuple[int, int]]:
    """Units of two sub-models, and neighbours."""
    units = axis.units.tolist()
    return [(units[0], units[-1]), (units[0], units[1]), *list(pairwise(units))[1:6]]


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in AXES for k in ZOO[name].k])
def test_exchange_everywhere_changes_nothing(name: str, k: int) -> None:
    program = traced(name)
    run = Runner(program, inputs_of(name))
    analysis = analyse(program, k)
    axes = axes_of(analysis)
    if k == 2:
        assert (len(axes), len(analysis.assignment.axes)) == AXES[name]
    values = random_values(program)
    expected = run(values)
    for axis in axes:
        for u, v in pairs_of(axis)[:2]:
            found = run(axis.swapped(values, u, v, axis.places))
            assert largest_difference(found, expected) < EQUAL, f"units {u} and {v} of {axis.name}"


@pytest.mark.parametrize("name", AXES)
def test_exchange_in_one_place_alone_changes_the_output(name: str) -> None:
    program = traced(name)
    run = Runner(program, inputs_of(name))
    values = random_values(program)
    expected = run(values)
    for axis in axes_of(analyse(program, 2)):
        assert len(axis.places) > 1, f"{axis.name} is coupled with nothing"
        for place in list(axis.places)[:4]:
            if place[0].endswith(INERT):
                continue
            # A unit may be dead behind a ReLU: some pair has to tell.
            changed = any(
                largest_difference(run(axis.swapped(values, u, v, [place])), expected) > DIFFERENT
                for u, v in pairs_of(axis)
            )
            assert changed, f"{place} does not matter"


def test_exchange_can_fail() -> None:
    # Local response normalisation looks at neighbours: its units have an order.
    program = traced("norm_local_response")
    run = Runner(program, inputs_of("norm_local_response"))
    values = random_values(program)
    axis = axes_of(analyse(program, 2))[0]
    u, v = axis.units[:2].tolist()
    assert largest_difference(run(axis.swapped(values, u, v, axis.places)), run(values)) > DIFFERENT


# ---------------------------------------------------------------------------------------------------------
# Isolation

ISOLATED = [
    "lenet", "mlp_batchnorm_dropout", "resnet_basic", "resnext", "shufflenet_v2", "densenet", "convnext", "unet", "vit",
    "mlp_mixer", "swin", "gpt", "llama_expand", "attention_multi_query", "lstm", "state_space", "cbam", "weight_norm",
    "tied_autoencoder", "prelu_one_slope", "hub_bert", "hub_t5",
]  # fmt: skip


def spread(items: list[str], count: int) -> list[str]:
    """Some of a list, evenly spaced, the last among them."""
    return items[:: max(1, len(items) // count)][: count - 1] + items[-1:]


@pytest.mark.parametrize("name", ISOLATED)
def test_isolation(name: str) -> None:
    k = ZOO[name].k[-1]
    part = gs.partition(traced(name), k=k)
    inputs = inputs_of(name)
    states = random_states(part)
    merged = part.merged_program(states)
    values = {entry.name: entry.tensor.detach() for entry in merged.state.values()}
    run = Runner(merged, inputs)
    before = run(values)
    runs = [Runner(program, inputs) for program in part.programs]
    own = [run_one(state) for run_one, state in zip(runs, states, strict=True)]
    generator = torch.Generator().manual_seed(1)
    plans = {
        plan.name: plan for plan in part.plan.state if plan.kind == "parameter" and plan.merge != "common"
    }
    moved = 0.0
    for number, tensor in enumerate(spread(list(plans), 8)):
        plan, one = plans[tensor], number % k
        noise = torch.randn(plan.local_shape(one), generator=generator, dtype=torch.float64) * 0.1
        after = runs[one](states[one] | {tensor: states[one][tensor] + noise})
        changed = perturbed(plan, values[tensor], one, noise, k)
        found = run(values | {tensor: changed})
        expected = [a + (new - old) / k for a, new, old in zip(before, after, own[one], strict=True)]
        assert largest_difference(found, expected) < 1e-9, f"{tensor} of sub-model {one}"
        moved = max(moved, largest_difference(after, own[one]))
        if plan.merge == "place":
            for other in set(range(k)) - {one}:
                assert torch.equal(plan.slice(changed, other), plan.slice(values[tensor], other))
    assert moved > DIFFERENT, "nothing that was perturbed matters"


# ---------------------------------------------------------------------------------------------------------
# Passes

PASSED = [
    "lenet", "mlp_batchnorm_dropout", "resnet_basic", "efficientnet", "unet", "swin", "gpt_dropout", "llama_expand",
    "lstm_stacked", "convnext_stochastic_depth", "auxiliary_head", "running_statistic", "frozen_backbone",
    "tied_autoencoder", "dataclass_output", "hub_t5",
]  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_passes_keep_their_input_and_give_the_same_twice(name: str) -> None:
    program = traced(name)
    k = ZOO[name].k[-1]
    texts = []
    for _ in range(2):
        with program_unchanged(program):
            divided = Partition(k).run(Programs.of(program))
        assert divided.modified
        assert len(divided.programs.items) == k
        merged = []
        for duplicate in (True, False):
            for item in divided.programs.items:
                check(item)
            with program_unchanged(program), program_unchanged(divided.programs.items[0]):
                result = Merge(duplicate).run(divided.programs)
            assert result.modified
            check(result.programs.single())
            merged.append(result.programs.single())
        assert str(merged[1]) == str(program)
        texts.append("\n".join(map(str, [*divided.programs.items, *merged])))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", PASSED)
def test_partition_into_one_is_the_identity(name: str) -> None:
    program = traced(name)
    result = Partition(1).run(Programs.of(program))
    assert not result.modified
    one = result.programs.single()
    assert str(one) == str(program)
    merged = Merge().run(result.programs).programs.single()
    assert str(merged) == str(program)
    call = call_of(name)
    for training in (True, False):
        expected = step(gs.emit(program).train(training), call)
        for other in (one, merged):
            assert_same_step(step(gs.emit(other).train(training), call), expected, f", training={training}")


@pytest.mark.parametrize("name", ["gpt", "resnet_basic"])
def test_sub_models_can_be_divided_again(name: str) -> None:
    program = traced(name)
    half = Partition(2).run(Programs.of(program)).programs.items[1]
    quarters = gs.partition(half, k=2)
    assert quarters.verify().ok
    whole = gs.partition(program, k=4).plan.parameter_counts()
    assert quarters.plan.parameter_counts() == whole[2:]


def test_merged_programs_can_be_divided_again() -> None:
    part = gs.partition(traced("lenet"), k=2)
    again = gs.partition(part.merged_program(), k=2)
    assert again.verify().ok
    assert again.plan.parameter_counts() == part.plan.parameter_counts()

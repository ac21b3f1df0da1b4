"""Parameters and states that other code puts in the place of an optimizer's: followed, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from manifold_kernels import FGSGD, AdamG, param_groups
from manifold_kernels.optim import ManifoldOptimizer

KINDS: dict[str, Callable[..., ManifoldOptimizer]] = {
    "stiefel": lambda model, **rest: FGSGD(param_groups(model, "stiefel"), lr=0.5, momentum=0.9, **rest),
    "adam_g": lambda model, **rest: AdamG(param_groups(model, "grassmann"), lr=0.05, **rest),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> None:
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masters", [False, True])
def test_states_that_are_moved_away_and_back_are_the_ones_that_step(kind: str, masters: bool) -> None:
    """Offloading puts copies into the state: the steps go on with these, and a state dict has what they made."""
    dtype = torch.bfloat16 if masters else torch.float32
    model, twin = network(dtype), network(dtype)
    optimizer, other = (KINDS[kind](m, master_weights=masters) for m in (model, twin))
    for first in (0, 2):
        train(model, optimizer, range(first, first + 2))
        train(twin, other, range(first, first + 2))
        for state in optimizer.state.values():
            for name in state:
                state[name] = state[name].clone()
    train(model, optimizer, range(4, 6))
    train(twin, other, range(4, 6))
    assert same(model, twin)
    mine, theirs = (o.state_dict()["state"] for o in (optimizer, other))
    assert all(torch.equal(mine[key][name], value) for key in mine for name, value in theirs[key].items())


def test_a_momentum_that_is_replaced_or_dropped_counts_at_the_next_step() -> None:
    """Zeros where the momentum was make the step of momentum zero: that without any, with the buffer as it is then; a
    buffer that is gone is begun anew."""
    for spoil in (
        lambda state: state.update(momentum_buffer=torch.zeros_like(state["momentum_buffer"])),
        lambda state: state.pop("momentum_buffer"),
        lambda state: state.clear(),
    ):
        model, plain = network(), network()
        optimizer, without = KINDS["stiefel"](model), FGSGD(param_groups(plain, "stiefel"), lr=0.5)
        train(model, optimizer, range(2))
        for parameter, moved in zip(plain.parameters(), model.parameters(), strict=True):
            parameter.data.copy_(moved)
        for state in optimizer.state.values():
            spoil(state)
        train(model, optimizer, range(2, 3))
        train(plain, without, range(2, 3))
        assert same(model, plain)


def test_a_state_that_does_not_fit_stops_the_step_by_name() -> None:
    model = network()
    optimizer = KINDS["stiefel"](model)
    train(model, optimizer, range(1))
    optimizer.state[model[3].weight]["momentum_buffer"] = torch.zeros(7)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"momenta\[3\]: wanted the shape.* \(3\.weight\) of shape \(2, 4\)"):
        train(model, optimizer, range(1, 2))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def swap(optimizer: ManifoldOptimizer, model: nn.Module) -> None:
    """As some libraries do it after they have wrapped a model."""
    found = dict(model.named_parameters())
    names = iter(optimizer.parameter_names())
    for group in optimizer.param_groups:
        group["params"] = [found[name] for _, name in zip(group["params"], names, strict=False)]


def changes() -> dict[str, Callable[[ManifoldOptimizer], Any]]:
    return {
        "one swapped": lambda o: o.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.zeros(4, 4, 3, 3))),
        "one more": lambda o: o.param_groups[1]["params"].append(nn.Parameter(torch.zeros(3))),
        "one less": lambda o: o.param_groups[1]["params"].pop(),
        "another order": lambda o: o.param_groups[1]["params"].reverse(),
        "a group less": lambda o: o.param_groups.pop(),
        "the first group less": lambda o: o.param_groups.pop(0),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("steps", [0, 2])
def test_param_groups_with_other_parameters_are_refused(change: str, steps: int) -> None:
    """The step would go to parameters that the groups no longer have, along the gradients of others."""
    model = network()
    optimizer = KINDS["stiefel"](model)
    train(model, optimizer, range(steps))
    changes()[change](optimizer)
    held = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    before = [parameter.detach().clone() for parameter in held]
    with pytest.raises(ValueError, match=r"wanted the parameters .* made with.* optimizer.rebind\(model\)"):
        train(model, optimizer, range(2, 3))
    assert all(torch.equal(p, old) for p, old in zip(held, before, strict=True))
    if steps:
        with pytest.raises(ValueError, match="wanted the parameters"):
            optimizer.state_dict()


@pytest.mark.parametrize("steps", [0, 2])
def test_rebinding_after_parameters_were_swapped_goes_on(steps: int) -> None:
    model, twin = network(), network()
    optimizer, other = KINDS["stiefel"](model), KINDS["stiefel"](twin)
    train(model, optimizer, range(steps))
    train(twin, other, range(steps))
    replaced = copy.deepcopy(model)
    swap(optimizer, replaced)
    with pytest.raises(ValueError, match=r"rebind\(model\)"):
        train(replaced, optimizer, range(steps, steps + 1))
    optimizer.rebind(replaced)
    train(replaced, optimizer, range(steps, steps + 2))
    train(twin, other, range(steps, steps + 2))
    assert same(replaced, twin)


@pytest.mark.parametrize("when", ["before the first step", "with gradients", "with zeros"])
def test_parameters_that_were_replaced_in_their_model_are_refused_whatever_their_gradients(when: str) -> None:
    """Gradients from before, or the zeros of ``zero_grad(set_to_none=False)``, would be stepped in silence for ever."""
    model = network()
    optimizer = KINDS["stiefel"](model)
    if when != "before the first step":
        train(model, optimizer, range(2))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    if when == "with zeros":
        optimizer.zero_grad(set_to_none=False)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [parameter.detach().clone() for parameter in held]
    with pytest.raises(ValueError, match=r"0\.weight.* was replaced in its model.*rebind\(model\)"):
        train(model, optimizer, range(2, 3))
    assert all(torch.equal(p, old) for p, old in zip(held, before, strict=True))
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state)
    with pytest.raises(ValueError, match="was replaced"):  # also after it was saved
        train(model, optimizer, range(2, 3))
    optimizer.rebind(model)
    train(model, optimizer, range(2, 4))
    with pytest.raises(TypeError, match=r"model: wanted a torch\.nn\.Module, got NoneType"):
        optimizer.rebind(None)


def test_copies_of_an_optimizer_know_their_own_parameters() -> None:
    model = network()
    optimizer = KINDS["stiefel"](model)
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, range(1))
    swap(other, model)
    with pytest.raises(ValueError, match=r"rebind\(model\)"):
        train(model, other, range(1))

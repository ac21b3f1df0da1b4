"""States from elsewhere: other versions, other types, torch's own tools, and parameters that were replaced."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_kernels import FGSGD, param_groups, partition

SAVED = Path(__file__).parent / "data" / "state_0.1.0.pt"


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> None:
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def test_a_state_of_version_0_1_0_goes_on() -> None:
    """Saved after three steps of a PIO training with moved scales, and two steps later."""
    saved = torch.load(SAVED, weights_only=True)
    model = network()
    groups = partition(model, "pio", ["sphere", "stiefel", None], seed=8)
    optimizer = FGSGD(groups, lr=0.1, momentum=0.1, backend="reference")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(int(state["step"]) == 3 for state in optimizer.state.values())
    train(model, optimizer, range(3, 5))
    for name, parameter in model.named_parameters():
        # Two steps of a backend that may have changed the order of its sums since: a few roundings of numbers below 3.
        assert torch.allclose(parameter, saved["later"][name], rtol=0, atol=10 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_training_goes_on_in_another_type(dtype: torch.dtype) -> None:
    """Buffers become those of the new type, as ``torch.optim.SGD`` converts them."""
    model = network()
    optimizer = FGSGD(param_groups(model, {"manifold": "stiefel"}), lr=0.5, momentum=0.9)
    train(model, optimizer, range(3))
    other = network(dtype)
    again = FGSGD(param_groups(other, "stiefel"), lr=0.5, momentum=0.9)  # projects the weights in their type
    again.load_state_dict(optimizer.state_dict())
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        expected = optimizer.state[old]["momentum_buffer"].to(dtype)
        assert torch.equal(again.state[new]["momentum_buffer"], expected)
        assert int(again.state[new]["step"]) == 3


def test_a_model_whose_parameters_were_replaced() -> None:
    """``assign=True`` puts new parameters into the model. The step says so; after rebinding it goes on as if nothing
    had happened."""
    model, twin = network(), network()
    optimizer, other = (FGSGD(param_groups(m, "stiefel"), lr=0.5, momentum=0.9) for m in (model, twin))
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"0\.weight.* was replaced in its model.*rebind\(model\)"):
        train(model, optimizer, range(2, 3))
    optimizer.rebind(model)
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}


def test_parameters_without_a_gradient_that_are_still_the_models_are_left_alone() -> None:
    model = network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5)
    optimizer.step()
    nn.utils.parametrizations.weight_norm(model[2])  # moves the weight's parameters; no other takes its name
    optimizer.step()


def test_rebinding_masters() -> None:
    model = network(torch.bfloat16)
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, master_weights=True)
    train(model, optimizer, range(2))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.rebind(model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    train(model, optimizer, range(2, 3))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(optimizer.state[parameter]["master"].bfloat16(), parameter) and not torch.equal(
            parameter, old
        )


def test_rebinding_to_other_weights_makes_masters_of_them() -> None:
    model, start = network(torch.bfloat16), network(torch.bfloat16)
    param_groups(start, "stiefel")  # moves its weights
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, master_weights=True)
    train(model, optimizer, range(2))
    model.load_state_dict(start.state_dict(), assign=True)
    optimizer.rebind(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2, 3))
    for parameter, other in zip(model.parameters(), start.parameters(), strict=True):
        # Nearest points in float32 are within a rounding of the weights, eps/2 of 1, and so are their roundings.
        assert torch.allclose(parameter, other, rtol=0, atol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("masters", [False, True])
def test_memory_that_is_replaced_below_a_parameter(masters: bool) -> None:
    """``model.to(...)`` puts new memory into the same parameters; steps go there."""
    dtype = torch.bfloat16 if masters else torch.float32
    model, twin = network(dtype), network(dtype)
    optimizer, other = (FGSGD(param_groups(m, "stiefel"), lr=0.5, master_weights=masters) for m in (model, twin))
    train(twin, other, range(4))
    train(model, optimizer, range(2))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    train(model, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.append(nn.Linear(2, 2)).__delitem__(0), "wanted its namesake"),
        (lambda model: model.__setitem__(0, nn.Conv2d(4, 4, 3)), "is off its manifold"),
        (lambda model: model.__setitem__(2, nn.Linear(4, 3)), "momentum_buffer: wanted shape"),
    ],
    ids=["name", "manifold", "shape"],
)
def test_rebinding_to_what_does_not_fit_changes_nothing(spoil: object, message: str) -> None:
    model = network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, momentum=0.9)
    train(model, optimizer, range(1))
    before, owned = copy.deepcopy(optimizer.state_dict()), [id(p) for p in model.parameters()]
    spoil(model)
    with pytest.raises(ValueError, match=message):
        optimizer.rebind(model)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == owned
    now = optimizer.state_dict()
    assert all(
        torch.equal(now["state"][k]["momentum_buffer"], v["momentum_buffer"]) for k, v in before["state"].items()
    )


def test_a_dict_with_torchs_own_entries_alone() -> None:
    """As ``torch.distributed.checkpoint`` keeps them: the plan follows from the param groups, weights are checked."""
    model = network()
    optimizer = FGSGD(param_groups(model, "oblique"), lr=0.5, momentum=0.9)
    train(model, optimizer, range(2))
    saved = {name: optimizer.state_dict()[name] for name in ("state", "param_groups")}
    again = network()
    resumed = FGSGD(param_groups(again, "oblique"), lr=0.1)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved))
    train(model, optimizer, range(2, 4))
    train(again, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    optimizer.rescale(model[0].weight, 0.5)
    saved = {name: optimizer.state_dict()[name] for name in ("state", "param_groups")}
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="is off its manifold"):
        resumed.load_state_dict(saved)

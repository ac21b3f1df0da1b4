"""State dicts: plain data, and training resumed with the same bits."""

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifold_kernels import functional, ops
from manifold_kernels.manifolds import Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG, ManifoldOptimizer
from manifold_kernels.views import Layout

BACKENDS = [name for name, reason in ops.backends().items() if reason is None]
KINDS: dict[str, tuple[type, Manifold, str, dict[str, Any]]] = {
    "sphere": (FGSGD, Sphere("fan"), "kernel", {"lr": 0.5, "momentum": 0.9, "dampening": 0.1}),
    "oblique": (FGSGD, Oblique(2.0), "kernel", {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
    "stiefel": (FGSGD, Stiefel(), "kernel", {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3}),
    "psi": (PSISGD, ScaleInvariant(), "filter", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "sgd_g": (SGDG, Grassmann(), "filter", {"momentum": 0.9}),
    "adam_g": (AdamG, Grassmann(), "filter", {"momentum": 0.9}),
}


def make(
    kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, backend: str = "reference"
) -> tuple[nn.Module, ManifoldOptimizer]:
    """A convolution in channels_last on a manifold and a linear layer without, one group each."""
    optimizer, of, view, settings = KINDS[kind]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2)).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    functional.project_weight_(of, model[0].weight, Layout(view))
    groups = [{"params": [model[0].weight], "manifold": of}, {"params": model[2].parameters(), "lr": 0.01}]
    return model, optimizer(groups, backend=backend, **settings)


def train(model: nn.Module, optimizer: ManifoldOptimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 2, 3, 3, generator=generator).to(model[2].weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step == 1:
            model[0].weight.grad[0] = math.nan  # counted, and left out
        optimizer.step()


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), (_, yours) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, yours), name


def listed(value: Any) -> Any:
    """``value`` with lists for tensors, so that == compares all of it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_with_the_same_bits(kind: str, dtype: torch.dtype, backend: str) -> None:
    model, optimizer = make(kind, dtype=dtype, backend=backend)
    train(model, optimizer, 3)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, resumed = make(kind, seed=1, dtype=dtype, backend=backend)
    train(again, resumed, 1)  # what it has learned so far must not matter
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3, first=3)
    train(again, resumed, 3, first=3)
    assert_same_bits(model, again)
    assert resumed.nonfinite_count() == optimizer.nonfinite_count() > 0
    assert resumed.param_groups[0]["manifold"] == KINDS[kind][1]


def test_the_state_dict_is_plain_data() -> None:
    model, optimizer = make("stiefel")
    train(model, optimizer, 1)

    def check(value: object) -> None:
        assert type(value) in (int, float, bool, str, type(None), list, tuple, dict, torch.Tensor), value
        if isinstance(value, dict):
            for key, item in value.items():
                check(key)
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)

    check(optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["manifold"] == {"name": "stiefel", "scale": "unit"}


def test_numbers_of_numpy_are_saved_as_pythons() -> None:
    """A schedule that computes in NumPy leaves its numbers in the param groups."""
    _, optimizer = make("adam_g")
    optimizer.param_groups[0].update(lr=np.float64(0.125), betas=(np.float32(0.5), np.float64(0.75)))
    saved = through_a_file(optimizer.state_dict())
    assert (saved["param_groups"][0]["lr"], saved["param_groups"][0]["betas"]) == (0.125, (0.5, 0.75))


def test_loading_copies() -> None:
    model, optimizer = make("sphere")
    train(model, optimizer, 2)
    again, resumed = make("sphere")
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    before = listed(optimizer.state_dict())
    train(again, resumed, 2, first=2)
    assert listed(optimizer.state_dict()) == before


def test_settings_and_scales_come_from_the_state() -> None:
    model, optimizer = make("sphere")
    with torch.no_grad():  # as a renormalisation does
        optimizer.plan.scales[0] *= 3
        model[0].weight *= 3
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.check()
    again, resumed = make("sphere")
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="off its manifold"):
        resumed.check()
    resumed.load_state_dict(optimizer.state_dict())
    resumed.check()
    assert resumed.param_groups[0]["lr"] == 0.125
    assert torch.equal(resumed.plan.scales, optimizer.plan.scales)
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert_same_bits(model, again)


def test_a_state_saved_before_the_first_step() -> None:
    model, optimizer = make("stiefel")
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"] == {}
    again, resumed = make("stiefel")
    train(again, resumed, 2)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert_same_bits(model, again)


def test_momentum_switched_on_after_the_last_step_is_part_of_the_state() -> None:
    model, optimizer = make("stiefel")
    optimizer.param_groups[1]["momentum"] = 0.0
    train(model, optimizer, 2)
    optimizer.param_groups[1]["momentum"] = 0.9
    again, resumed = make("stiefel", seed=1)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, 2, first=2)
    train(again, resumed, 2, first=2)
    assert_same_bits(model, again)


def test_copies_of_manifold_optimizers_go_on_alone() -> None:
    for kind in KINDS:
        model, optimizer = make(kind)
        train(model, optimizer, 2)
        other, twin = copy.deepcopy((model, optimizer))
        train(other, twin, 2, first=2)
        assert int(optimizer.state[model[0].weight]["step"]) == 2
        train(model, optimizer, 2, first=2)
        assert_same_bits(model, other)


def test_schedulers_resume() -> None:
    model, optimizer = make("stiefel")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    again, resumed = make("stiefel", seed=1)
    rescheduler = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 6)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        scheduler.step()
    again.load_state_dict(model.state_dict())
    rescheduler.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for step in range(3, 6):
        for m, o, s in ((model, optimizer, scheduler), (again, resumed, rescheduler)):
            train(m, o, 1, first=step)
            s.step()
    assert optimizer.param_groups[1]["lr"] == resumed.param_groups[1]["lr"] < 0.01
    assert_same_bits(model, again)


def test_second_moments_have_one_number_a_vector() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model, optimizer = make("adam_g", dtype=dtype)
        train(model, optimizer, 1)
        state = optimizer.state[model[0].weight]
        assert state["exp_avg_sq"].shape == (4,) and state["exp_avg_sq"].dtype == wanted
        assert state["exp_avg"].stride() == model[0].weight.stride()
        saved = through_a_file(optimizer.state_dict())
        saved["state"][0]["exp_avg_sq"] = torch.zeros(4, dtype=torch.float16)
        with pytest.raises(ValueError, match=f"exp_avg_sq: wanted dtype {wanted}, got torch.float16"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("names", [7, ["one"], "weights"])
def test_names_that_are_none_are_left_alone(names: object) -> None:
    """A group may have an entry of its own that is called so."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = FGSGD([{"params": [weight], "names": names}], lr=0.1)
    assert optimizer.parameter_names() == (["one"] if names == ["one"] else ["param group 0, parameter 0"])


def test_names_are_the_optimizers_own_after_loading() -> None:
    one, other = (FGSGD([(name, nn.Parameter(torch.ones(2)))], lr=0.1) for name in ("module.weight", "weight"))
    other.load_state_dict(one.state_dict())
    assert other.parameter_names() == ["weight"]

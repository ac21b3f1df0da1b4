"""State dicts: plain data, training resumed with the same bits, and nothing taken over that does not fit."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifold_kernels import functional, ops
from manifold_kernels.manifolds import Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG, ManifoldOptimizer
from manifold_kernels.plan import GROUP_COLUMNS
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


def column(saved: dict[str, Any], name: str) -> torch.Tensor:
    return saved["plan"]["groups"][:, GROUP_COLUMNS.index(name)]


def put(saved: dict[str, Any], position: int, name: str, value: object) -> None:
    saved["state"][position][name] = value


def cut_off(entries: dict[str, Any], name: str) -> None:
    """A tensor with one number of memory. Torch makes none of a file; what a program hands over may be one."""
    tensor = entries[name] = entries[name].clone()
    tensor.untyped_storage().resize_(4)


Spoil = Callable[[dict[str, Any]], object]
MISFITS: list[tuple[Spoil, str]] = [
    (lambda s: s.pop("plan"), "'plan' is missing"),
    (lambda s: s.pop("nonfinite"), "'nonfinite' is missing"),
    (lambda s: s.update(version=0), "wanted version 1, got 0"),
    (lambda s: s.update(state=[]), "wanted 'state' as dict"),
    (lambda s: s["param_groups"].pop(), "wanted 2 param groups, got 1"),
    (lambda s: s["param_groups"][1]["params"].pop(), "wanted 2 parameters in param group 1, got 1"),
    (lambda s: s["param_groups"][1].pop("lr"), "param group 1 lacks 'lr'"),
    (lambda s: s["param_groups"][1].update(lr=-1.0), "param group 1: lr: wanted"),
    (lambda s: s["param_groups"][0].update(weight_decay=0.1), "param group 0: weight_decay: has no effect"),
    (lambda s: s["param_groups"][0].update(manifold={"name": "torus"}), "param group 0: manifold: wanted"),
    (lambda s: s["param_groups"][0].update(manifold={"name": "stiefel", "radius": 1}), "does not describe one"),
    (lambda s: s["param_groups"][0].update(manifold={"name": "grassmann"}), "FGSGD wants one of"),
    (lambda s: s["param_groups"][0].update(manifold={"name": "sphere", "scale": 1.0}), "group 0 has manifold 3"),
    (lambda s: s["param_groups"][0].update(grouping="individual"), "group 0 has individual 0"),
    (lambda s: s["plan"].pop("scales"), r"plan\['scales'\]: wanted a dense tensor"),
    (lambda s: s["plan"].update(groups=s["plan"]["groups"][:, 1:]), r"plan: wanted groups \(\*, 16\)"),
    (lambda s: s["plan"].update(groups=s["plan"]["groups"].int()), "plan: wanted groups contiguous torch.int64"),
    (lambda s: s["plan"].update(groups=s["plan"]["groups"][:2]), "wanted a plan of 3 groups, got 2"),
    (lambda s: column(s, "parameter").fill_(7), "plan: group 0 has parameter 7"),
    (lambda s: column(s, "hyper").add_(1), "plan: group 0 has hyper 1"),
    (lambda s: column(s, "rule").fill_(1), "plan: group 0 has rule 1"),
    (lambda s: column(s, "view").fill_(9), "plan: group 0 has view 9"),
    (lambda s: column(s, "retraction").fill_(5), "plan: group 1 has retraction 5"),
    (lambda s: column(s, "scale").add_(1), "plan: group 2 has scale 3"),
    (lambda s: column(s, "scale").sub_(1), "plan: group 0 has scale -1"),
    (lambda s: column(s, "count")[:1].add_(1), "plan: group 0 ends at component 9"),
    (lambda s: s["plan"]["scales"].neg_(), "plan: wanted finite scales > 0"),
    (lambda s: s["plan"]["scales"].mul_(2), "off its manifold"),
    (lambda s: s.update(nonfinite=s["nonfinite"][:1]), "wanted nonfinite as 3 counts in int64"),
    (lambda s: s.update(nonfinite=s["nonfinite"].double()), "wanted nonfinite as 3 counts in int64"),
    (lambda s: s["state"].update({9: {}}), "has a state for parameter 9"),
    (lambda s: s["state"][0].pop("step"), r"param group 0, parameter 0 of shape \(4, 2, 3, 3\): step: wanted"),
    (lambda s: put(s, 0, "step", torch.tensor(-1)), "step: wanted"),
    (lambda s: put(s, 0, "step", torch.tensor(1.0)), "step: wanted"),
    (lambda s: s["state"][0].pop("momentum_buffer"), "momentum_buffer: is missing"),
    (lambda s: put(s, 0, "momentum_buffer", None), "momentum_buffer: wanted a dense tensor"),
    (lambda s: put(s, 0, "momentum_buffer", torch.zeros(4, 2, 9)), r"momentum_buffer: wanted shape \(4, 2, 3, 3\)"),
    (lambda s: put(s, 0, "momentum_buffer", torch.zeros(4, 2, 3, 3)), "momentum_buffer: wanted strides"),
    (lambda s: put(s, 0, "momentum_buffer", torch.zeros(()).expand(4, 2, 3, 3)), "momentum_buffer: wanted strides"),
    (lambda s: put(s, 2, "momentum_buffer", torch.zeros(2).int()), "momentum_buffer: wanted dtype torch.float32"),
    (lambda s: put(s, 0, "exp_avg", torch.zeros(1)), "exp_avg: wanted one of"),
    (lambda s: put(s, 0, "step", torch.tensor(2**63 - 1)), "step: wanted"),
    (lambda s: s["nonfinite"].fill_(2**63 - 1), "wanted nonfinite as 3 counts"),
    (lambda s: s["state"][0]["momentum_buffer"][2].fill_(math.nan), "momentum_buffer: wanted finite numbers"),
    (lambda s: s["state"][0]["momentum_buffer"][2].fill_(math.inf), "momentum_buffer: wanted finite numbers"),
    (lambda s: s["state"].pop(0), r"wanted a state for .* parameter 0 of shape \(4, 2, 3, 3\), got none"),
    (lambda s: s["param_groups"][0].update(params=[1]), "param groups: wanted every key once, got 1 twice"),
    (lambda s: s["param_groups"][0].update(params=[[0]]), r"params: wanted numbers or names, got \[0\]"),
    (lambda s: s["param_groups"][0].update(lr=torch.tensor(1.0, device="meta")), "lr: wanted a dense tensor with"),
    (lambda s: s["param_groups"][0].update(lr=torch.ones(1).to_sparse()), "lr: wanted a dense tensor with"),
    (lambda s: s["param_groups"][0].update(lr=10**400), "param group 0: lr: wanted"),
    (lambda s: cut_off(s["state"][0], "momentum_buffer"), "momentum_buffer: wanted 288 bytes of storage, got 4"),
    (lambda s: cut_off(s["state"][0], "step"), "step: wanted 8 bytes of storage, got 4"),
    (lambda s: cut_off(s["plan"], "groups"), r"plan\['groups'\]: wanted 384 bytes of storage, got 4"),
    (lambda s: cut_off(s["plan"], "scales"), r"plan\['scales'\]: wanted 24 bytes of storage, got 4"),
    (lambda s: cut_off(s, "nonfinite"), "nonfinite: wanted 24 bytes of storage, got 4"),
]


@pytest.mark.parametrize(("spoil", "message"), MISFITS)
def test_a_state_that_does_not_fit_is_refused(spoil: Spoil, message: str) -> None:
    model, optimizer = make("stiefel")
    train(model, optimizer, 2)
    saved = through_a_file(optimizer.state_dict())
    spoil(saved)
    twin_model, twin = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    # The optimizer goes on as if nothing had happened.
    train(model, optimizer, 2, first=2)
    train(twin_model, twin, 2, first=2)
    assert_same_bits(model, twin_model)
    assert optimizer.nonfinite_count() == twin.nonfinite_count()
    assert listed(optimizer.state_dict()) == listed(twin.state_dict())


@pytest.mark.parametrize(
    "junk",
    [torch.zeros(2, 3), {"groups": 1}, "groups", [torch.zeros(3)], [{"groups": 1}]],
    ids=["tensor", "dict", "word", "list of tensors", "list of dicts"],
)
def test_assignments_are_looked_at_before_they_are_indexed(junk: object) -> None:
    """Torch warns of a tensor that is indexed by a word, before it raises."""
    _, optimizer = make("stiefel")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["assignments"] = junk
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="assignments: wanted a list of dicts of 'groups' and 'manifolds'"):
            optimizer.load_state_dict(saved)
    assert not said


def test_a_state_of_another_rule_is_refused() -> None:
    model, optimizer = make("sgd_g")
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(betas=(0.9, 0.99), eps=1e-8)
    saved["param_groups"][0].update(momentum=0.0)
    with pytest.raises(ValueError, match="group 0 has rule 2, the optimizer's param groups say 3"):
        make("adam_g")[1].load_state_dict(saved)


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


@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf])
def test_second_moments_that_are_none_are_refused(value: float) -> None:
    """Their roots would carry NaN into weights."""
    model, optimizer = make("adam_g")
    train(model, optimizer, 1)
    saved = through_a_file(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"][1] = value
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(4, 2, 3, 3\): exp_avg_sq: wanted numbers >= 0"):
        optimizer.load_state_dict(saved)


def test_a_momentum_that_another_type_cannot_hold_is_refused() -> None:
    """As infinity it would keep its kernel where it is for ever."""
    model, optimizer = make("stiefel")
    train(model, optimizer, 1)
    optimizer.state[model[0].weight]["momentum_buffer"][1, 1, 0, 0] = 1e5
    _, half = make("stiefel", dtype=torch.float16)
    with pytest.raises(ValueError, match="momentum_buffer: wanted finite numbers, also as"):
        half.load_state_dict(optimizer.state_dict())
    assert not half.state


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


@pytest.mark.parametrize("junk", [None, [1], "state"])
def test_a_state_is_a_dict(junk: object) -> None:
    with pytest.raises(TypeError, match="state_dict: wanted a dict, got"):
        make("stiefel")[1].load_state_dict(junk)

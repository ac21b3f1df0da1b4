"""States that do not fit are refused by name, and the optimizer goes on as it was."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_checkpoint import assert_same_bits, listed, make, through_a_file, train

from manifold_kernels import FGSGD, param_groups
from manifold_kernels.plan import GROUP_COLUMNS


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
    (lambda s: column(s, "retraction").fill_(5), "plan: group 0 has retraction 5"),
    (lambda s: column(s, "scale").add_(1), "plan: group 2 has scale 3"),
    (lambda s: column(s, "scale").sub_(1), "plan: group 0 has scale -1"),
    (lambda s: column(s, "count")[:1].add_(1), "plan: group 0 has count 9, the optimizer's param groups say 8"),
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


def test_a_state_of_another_model_names_what_differs_first() -> None:
    """A filter more makes two kernels more; without a momentum the plan is all that knows of it."""
    for momentum in (0.9, 0.0):
        convs = [torch.nn.Conv2d(2, outputs, 3, bias=False) for outputs in (4, 5)]
        four, five = (FGSGD(param_groups(conv, "stiefel"), lr=0.1, momentum=momentum) for conv in convs)
        convs[0].weight.grad = torch.ones_like(convs[0].weight)
        four.step()
        with pytest.raises(ValueError, match="plan: group 0 has count 8, the optimizer's param groups say 10"):
            five.load_state_dict(four.state_dict())


def test_a_state_of_another_rule_is_refused() -> None:
    model, optimizer = make("sgd_g")
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(betas=(0.9, 0.99), eps=1e-8)
    saved["param_groups"][0].update(momentum=0.0)
    with pytest.raises(ValueError, match="group 0 has rule 2, the optimizer's param groups say 3"):
        make("adam_g")[1].load_state_dict(saved)


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


@pytest.mark.parametrize("junk", [None, [1], "state"])
def test_a_state_is_a_dict(junk: object) -> None:
    with pytest.raises(TypeError, match="state_dict: wanted a dict, got"):
        make("stiefel")[1].load_state_dict(junk)

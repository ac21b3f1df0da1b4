"""Gradient scalers and 16-bit weights with float32 masters, through the optimizers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, SGDG, AdamG, ops, param_groups
from manifold_kernels.optim import ManifoldOptimizer, constraint

KINDS = [
    lambda model, **rest: FGSGD(param_groups(model, "stiefel", linear="sphere"), lr=0.5, momentum=0.9, **rest),
    lambda model, **rest: FGSGD(param_groups(model, "oblique"), lr=0.5, momentum=0.9, nesterov=True, **rest),
    lambda model, **rest: PSISGD(param_groups(model, "scale_invariant"), lr=0.1, momentum=0.9, **rest),
    lambda model, **rest: SGDG(param_groups(model, "grassmann"), lr=0.2, momentum=0.9, **rest),
    lambda model, **rest: AdamG(param_groups(model, "grassmann"), lr=0.05, **rest),
]
kinds = pytest.mark.parametrize("make", KINDS, ids=["stiefel", "oblique", "psi", "sgd_g", "adam_g"])
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.fixture(autouse=True)
def _backend_is_there(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if name == "cpu" and (missing := ops.extension_error()) is not None:
        pytest.skip(f"the compiled kernels are not there: {missing}")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    ).to(dtype)


def loss_of(model: nn.Module, batch: int, poison: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(8, 2, 5, 5, generator=generator)
    return poison * model(x.to(next(model.parameters()).dtype)).float().square().mean()


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state[name] for state in optimizer.state_dict()["state"].values() for name in sorted(state)]


def assert_same(one: nn.Module, other: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if optimizers:
        mine, theirs = map(states, optimizers)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@kinds
@backends
def test_a_scaler_changes_no_bit_and_a_skipped_step_leaves_no_trace(make: object, backend: str) -> None:
    """Scales are powers of two, which float32 carries exactly: scaled training has the bits of training without, and a
    step of infinite gradients, the very first or a later one, those of a training that never saw the batch."""
    plain, scaled = network(), network()
    mine, theirs = make(plain, backend=backend), make(scaled, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    statistics = copy.deepcopy(scaled[1].state_dict())
    scales = []
    for batch, poison in enumerate([torch.inf, 1.0, 1.0, torch.inf, 1.0, 1.0, 1.0, 1.0]):
        theirs.zero_grad()
        scaler.scale(loss_of(scaled, batch, poison)).backward()
        before = [p.detach().clone() for p in scaled.parameters()]
        scaler.step(theirs)
        if poison == 1.0:
            mine.zero_grad()
            loss_of(plain, batch).backward()
            mine.step()
        else:
            assert all(torch.equal(p, old) for p, old in zip(scaled.parameters(), before, strict=True))
            assert theirs.nonfinite_count() == 0
        scaler.update()
        scales.append(scaler.get_scale())
        scaled[1].load_state_dict(statistics)  # batch norm sees skipped batches, too
        plain[1].load_state_dict(statistics)
    assert_same(plain, scaled, mine, theirs)
    assert max(scales) > min(scales)


@backends
def test_unscaling_clipping_and_stepping(backend: str) -> None:
    """``unscale_`` before clipping, as torch's recipe has it, is not undone or done twice by the step."""
    plain, scaled = network(), network()
    mine, theirs = (FGSGD(param_groups(m, "stiefel"), lr=0.5, backend=backend) for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in range(3):
        loss_of(plain, batch).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        mine.step()
        scaler.scale(loss_of(scaled, batch)).backward()
        scaler.unscale_(theirs)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(theirs)
        scaler.update()
        mine.zero_grad()
        theirs.zero_grad()
    assert_same(plain, scaled)


def test_raising_for_infinite_gradients_leaves_a_scalers_to_the_scaler() -> None:
    model = network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(model, 0, torch.inf)).backward()
    scaler.step(optimizer)
    with pytest.raises(ValueError, match="Nothing was written"):
        optimizer.step()


def masters(optimizer: ManifoldOptimizer, model: nn.Module) -> list[Tensor]:
    return [optimizer.state[p]["master"] for p in model.parameters()]


@kinds
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_take_the_steps_of_float32_weights(make: object, backend: str, dtype: torch.dtype) -> None:
    """From the masters on, everything has the bits of a float32 training with the same gradients; weights are the
    masters' roundings; and masters lie on their manifolds as closely as float32 allows."""
    model = network(dtype)
    optimizer = make(model, backend=backend, master_weights=True)
    wide, other = network(), None
    for step in range(6):
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        if step == 0:
            optimizer._init_group()  # the masters before the first step
            for parameter, master in zip(wide.parameters(), masters(optimizer, model), strict=True):
                parameter.data.copy_(master)
            groups = [
                {**{k: v for k, v in group.items() if k not in ("names", "param_names")}}
                for group in optimizer.param_groups
            ]
            of = dict(zip(model.parameters(), wide.parameters(), strict=True))
            for group in groups:
                group["params"] = [of[p] for p in group["params"]]
            other = type(optimizer)(groups, lr=0.1, backend=backend)
        for parameter, short in zip(wide.parameters(), model.parameters(), strict=True):
            parameter.grad = short.grad.float()
        optimizer.step()
        other.step()
        for parameter, short, master in zip(
            wide.parameters(), model.parameters(), masters(optimizer, model), strict=True
        ):
            assert torch.equal(master, parameter) and torch.equal(short, master.to(dtype))
    own = [optimizer.state[p]["master"] for group in optimizer.param_groups for p in group["params"]]
    found = list(constraint.violations(optimizer.plan, own))
    assert all(each.violation <= each.tolerance for each in found)


@backends
def test_a_skipped_step_leaves_weights_that_have_masters(backend: str) -> None:
    """Weights that are no rounding of a point of the manifold become one at the first step taken, not before."""
    model = network(torch.bfloat16)
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, master_weights=True, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, 0, torch.inf)).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@kinds
def test_masters_are_saved(make: object) -> None:
    """Training resumed from a file goes on with the same bits, which weights alone would not allow."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    model = network(torch.bfloat16)
    optimizer = make(model, master_weights=True)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(torch.bfloat16)
    resumed = make(again, master_weights=True)
    with pytest.raises(ValueError, match="master: its rounding is not the weight"):
        shifted = copy.deepcopy(saved["optimizer"])
        next(state for state in shifted["state"].values() if state["master"].dim() > 1)["master"].mul_(1.5)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(shifted)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    assert_same(model, again, optimizer, resumed)


def test_rescaling_moves_masters() -> None:
    model = network(torch.bfloat16)
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, master_weights=True)
    loss_of(model, 0).backward()
    optimizer.step()
    weight, master = model[0].weight, optimizer.state[model[0].weight]["master"]
    optimizer.rescale(weight, 0.37)
    assert torch.equal(weight, master.to(weight.dtype))
    # Columns have norm 0.37 but for the roundings of 3 products, their sum and the root.
    assert torch.allclose(master.flatten(0, 1).norm(dim=1), torch.tensor(0.37), rtol=1e-6)

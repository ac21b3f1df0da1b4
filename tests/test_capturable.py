"""Numbers in tensors: the operator's ``live`` table, and steps that read nothing from a device."""

from __future__ import annotations

import pytest
import torch
from stepping import hyper_table, run_steps, start
from test_amp_operator import Engine, backends, engines, rows_of, same, step, weight_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import FGSGD, PSISGD, AdamG, ops
from manifold_kernels.ops import Step
from manifold_kernels.optim import settings
from manifold_kernels.plan import Plan

__all__ = ["step"]  # the fixture

TERMS = {"momentum": 1.0, "lr": 1.0, "rho": 1.0, "curvature": 1.0, "clip": 1.0, "guard": 1.0, "beta2": 1.0, "eps": 1.0}


@backends
@engines
def test_a_live_table_has_the_last_word(step: Step, engine: Engine) -> None:
    """With ones in ``hyper``, which say that there are terms, steps have the bits of steps with the live numbers."""
    w, rows = weight_of(engine), rows_of(engine)
    wanted = {"momentum": 0.5, "lr": 0.25, "rho": 0.75, "curvature": 9.0, "clip": 0.2, "guard": 3.0}
    plain, run = (start([w], rows, [TERMS]) for _ in range(2))
    plan = Plan.build(rows, [w])
    for lr in (0.25, 0.125):
        grad = torch.randn_like(w)
        live = hyper_table([{**wanted, "lr": lr}])
        run_steps(step, plain, [[grad]], rows, [{**wanted, "lr": lr}])
        step(
            run.params, [grad], run.momenta, run.variances, run.steps, run.nonfinite,
            plan.groups, plan.components, plan.scales, hyper_table([TERMS]), None, None, None, live,
        )  # fmt: skip
    assert same(plain, run)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_momentum_in_a_tensor(backend: str) -> None:
    """OneCycleLR moves the learning rate and the momentum; both in tensors give the bits of both as numbers."""
    if ops.backends()[backend] is not None:
        pytest.skip(f"the backend {backend} is not there")
    finals = []
    for wrap in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.linalg.qr(torch.randn(6, 4))[0].mT.contiguous())
        optimizer = FGSGD(
            [weight], lr=wrap(0.1), momentum=wrap(0.9), manifold="stiefel", view="matrix", backend=backend
        )
        for number in range(5):
            optimizer.param_groups[0]["lr"] = wrap(0.1 / (1 + number))
            if number % 2:
                momentum = optimizer.param_groups[0]["momentum"]
                if isinstance(momentum, Tensor):
                    momentum.fill_(0.1 * number)
                else:
                    optimizer.param_groups[0]["momentum"] = 0.1 * number
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        finals.append(weight.detach())
    assert torch.equal(*finals)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_tensor_that_becomes_nonsense_stops_the_step(value: float) -> None:
    weight, rate = nn.Parameter(torch.zeros(2)), torch.tensor(0.1)
    optimizer = FGSGD([weight], lr=rate)
    weight.grad = torch.ones(2)
    optimizer.step()
    before = weight.detach().clone()
    rate.fill_(value)
    with pytest.raises(ValueError, match="lr: wanted a finite number >= 0"):
        optimizer.step()
    assert torch.equal(weight, before)


class NoReading(TorchDispatchMode):
    """Raises where a number leaves a tensor, for which the host would have to wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number was read from a tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [FGSGD, PSISGD, AdamG])
def test_a_step_reads_no_number_from_a_tensor(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate in a tensor, a gradient scaler and masters, and tables that stay where they are, as a
    captured graph needs it. What checks numbers looks at those on the CPU alone, and is taken to find none there."""
    if ops.extension_error() is not None:
        pytest.skip("the reference reads what it likes")
    weights = [nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))]
    optimizer = kind(weights, lr=torch.tensor(0.1), master_weights=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    monkeypatch.setattr(settings, "check", lambda group: None)
    tables = optimizer._live, optimizer._steps, optimizer._operands.weights()[0]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with NoReading():
        optimizer.step()
        with pytest.raises(AssertionError, match="a number was read"):
            float(optimizer.param_groups[0]["lr"])
    assert optimizer._steps.tolist() == [2, 2]
    now = optimizer._live, optimizer._steps, optimizer._operands.weights()[0]
    assert all(mine is theirs for mine, theirs in zip(tables, now, strict=True))

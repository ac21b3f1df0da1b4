"""Euclidean groups of the reference are torch.optim.SGD to the bit, and so is the momentum of FG-SGD groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from stepping import group, place_, run_steps
from torch import Tensor

from manifold_kernels.manifolds import Euclidean, Sphere
from manifold_kernels.reference import step_
from manifold_kernels.views import Layout

OPTIONS = [
    {
        "lr": 0.13,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "maximize": maximize,
        "weight_decay": wd,
    }
    for momentum, dampening, nesterov, maximize, wd in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0, 1), (0, 1), (0.0, 0.05)
    )
    if not (nesterov and (dampening or not momentum)) and (momentum or not dampening)
]


def name(options: object) -> str | None:
    """Test names list the options that are set."""
    if not isinstance(options, dict):
        return None
    return "-".join(f"{key}={value:g}" for key, value in options.items() if value and key != "lr") or "plain"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def torch_sgd(
    params: list[Tensor], grads: list[list[Tensor | None]], options: dict[str, float]
) -> tuple[list[Tensor], list[Tensor | None]]:
    weights = [torch.nn.Parameter(p.clone()) for p in params]
    named = {**options, "nesterov": bool(options["nesterov"]), "maximize": bool(options["maximize"])}
    optimizer = torch.optim.SGD(weights, foreach=False, fused=False, **named)
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [w.detach() for w in weights], [optimizer.state[w].get("momentum_buffer") for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_euclidean_groups_equal_torch(options: dict[str, float], dtype: torch.dtype) -> None:
    # 5 * 7 * 3 * 3 elements leave a tail behind every vector width; the fourth tensor is not dense in memory.
    shapes = [(5, 7, 3, 3), (11,), (1,), (3, 3)]
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    params[0] = params[0].to(memory_format=torch.channels_last)
    params[3] = torch.randn(6, 7, dtype=dtype)[::2, 1:4]
    grads: list[list[Tensor | None]] = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(4)]
    grads[0][1] = grads[2][2] = None
    expected, buffers = torch_sgd(params, grads, options)
    # The first weight lies in three groups of listed kernels, the others in one flat group each.
    order = torch.randperm(35)
    groups = [group(Euclidean(), "kernel", components=part) for part in (order[:4], order[4:20], order[20:])]
    groups += [group(Euclidean(), parameter=i) for i in (1, 2, 3)]
    run = run_steps(step_, params, grads, groups, [options], fill=math.nan)
    for index in range(4):
        assert torch.equal(run.params[index], expected[index])
        if options["momentum"]:
            assert torch.equal(run.momenta[index], buffers[index])
    assert run.steps.tolist() == [4, 3, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [o for o in OPTIONS if not o["nesterov"]], ids=name)
def test_sixteen_bits_are_float32_rounded_when_stored(options: dict[str, float], dtype: torch.dtype) -> None:
    """Second steps from the same numbers: torch in float32 gives the buffer and, along its rounding, the weight."""
    w, first, second = (torch.randn(37).to(dtype) for _ in range(3))
    before = run_steps(step_, [w], [[first]], [group(Euclidean())], [options])
    run = run_steps(step_, [w], [[first], [second]], [group(Euclidean())], [options])

    def torch_step(grad: Tensor, buffer: Tensor | None, **named: float) -> tuple[Tensor, Tensor | None]:
        weight = torch.nn.Parameter(before.params[0].float())
        weight.grad = grad
        optimizer = torch.optim.SGD([weight], foreach=False, fused=False, **named)
        if buffer is not None:
            optimizer.state[weight]["momentum_buffer"] = buffer
        optimizer.step()
        return weight.detach().to(dtype), optimizer.state[weight].get("momentum_buffer")

    named = {**options, "nesterov": False, "maximize": bool(options["maximize"])}
    if not options["momentum"]:
        assert torch.equal(run.params[0], torch_step(second.float(), None, **named)[0])
        return
    _, buffer = torch_step(second.float(), before.momenta[0].float(), **named)
    assert buffer is not None and torch.equal(run.momenta[0], buffer.to(dtype))
    assert torch.equal(run.params[0], torch_step(buffer.to(dtype).float(), None, lr=options["lr"])[0])


def test_non_finite_numbers_are_written_through() -> None:
    grad = torch.tensor([1.0, math.nan, math.inf])
    run = run_steps(step_, [torch.zeros(3)], [[grad]], [group(Euclidean())], [{"lr": 1.0}])
    torch.testing.assert_close(run.params[0], torch.tensor([-1.0, math.nan, -math.inf]), equal_nan=True)
    assert run.nonfinite.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [o for o in OPTIONS if o["momentum"]], ids=name)
def test_momentum_on_manifolds_equals_torch(options: dict[str, float], dtype: torch.dtype) -> None:
    """[FG] Eq. 31 lives in the ambient space: with given gradients the buffers do not depend on the manifold."""
    w = place_(Sphere(), torch.randn(4, 3, 3, 3, dtype=dtype), Layout("kernel"))
    grads: list[list[Tensor | None]] = [[torch.randn_like(w)] for _ in range(4)]
    _, buffers = torch_sgd([w], grads, {**options, "weight_decay": 0.0})
    run = run_steps(step_, [w], grads, [group(Sphere())], [options], fill=math.nan)
    assert torch.equal(run.momenta[0], buffers[0])


def test_first_momentum_is_the_gradient() -> None:
    w = place_(Sphere(), torch.randn(4, 3, 3, 3), Layout("kernel"))
    grad = torch.randn_like(w)
    hyper = [{"momentum": 0.9, "dampening": 0.5}]
    run = run_steps(step_, [w], [[grad]], [group(Sphere())], hyper, fill=math.nan)
    assert torch.equal(run.momenta[0], grad)

"""The optimizers over the CUDA backend, run on the CPU by the emulator: beside the CPU's and the reference's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import cuda_emulated
import pytest
import torch
from cuda_emulated import in_place_of_the_cpu, launched, set_schedule
from test_amp import (  # noqa: F401  the tests themselves
    test_a_scaler_changes_no_bit_and_a_skipped_step_leaves_no_trace,
    test_a_skipped_step_leaves_weights_that_have_masters,
    test_masters_take_the_steps_of_float32_weights,
    test_unscaling_clipping_and_stepping,
)
from test_capturable import (  # noqa: F401  the tests themselves
    test_a_step_reads_no_number_from_a_tensor,
    test_momentum_in_a_tensor,
)
from test_optim_checkpoint import test_training_resumes_with_the_same_bits  # noqa: F401  the test itself
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, SGDG, AdamG, ops, param_groups, partition
from manifold_kernels.optim import ManifoldOptimizer

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)
if (reason := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {reason}", allow_module_level=True)

ALL = ["sphere", "oblique", "stiefel", None]
#: By the name of the method, the optimizer of a model for a learning rate in a tensor.
METHODS: dict[str, Callable[..., ManifoldOptimizer]] = {
    "pi": lambda model, rate, **rest: FGSGD(partition(model, "pi", ALL), lr=rate, momentum=0.9, **rest),
    "po": lambda model, rate, **rest: FGSGD(partition(model, "po", ALL, subsets=2), lr=rate, momentum=0.9, **rest),
    "pio": lambda model, rate, **rest: FGSGD(
        partition(model, "pio", ALL), lr=rate, momentum=0.9, nesterov=True, step_size="general", curvature=2.0, **rest
    ),
    "individual": lambda model, rate, **rest: FGSGD(partition(model, "individual", ALL), lr=rate, **rest),
    "single exp": lambda model, rate, **rest: FGSGD(
        partition(model, "single", ["sphere", "oblique", "stiefel"], retraction="exp"), lr=rate, momentum=0.9, **rest
    ),
    "matrices": lambda model, rate, **rest: FGSGD(
        param_groups(model, {"manifold": "stiefel", "view": "matrix"}, linear="oblique"), lr=rate, momentum=0.9, **rest
    ),
    "psi_sgd": lambda model, rate, **rest: PSISGD(param_groups(model, "scale_invariant"), lr=rate, **rest),
    "psi_sgdm": lambda model, rate, **rest: PSISGD(
        param_groups(model, "scale_invariant"), lr=rate, momentum=0.9, weight_decay=1e-3, **rest
    ),
    "sgd_g": lambda model, rate, **rest: SGDG(param_groups(model, "grassmann"), lr=rate, **rest),
    "adam_g": lambda model, rate, **rest: AdamG(param_groups(model, "grassmann"), lr=rate, **rest),
}


@pytest.fixture(autouse=True)
def _one_after_the_other(request: pytest.FixtureRequest) -> Iterator[None]:
    """Imported tests run on the emulator; those here choose by themselves."""
    torch.set_num_threads(1)
    set_schedule(0)
    if request.function.__module__ == __name__:
        yield
        return
    if request.node.callspec.params.get("backend") == "reference":
        pytest.skip("runs beside the tests of the CPU")
    with in_place_of_the_cpu():
        yield


def network(dtype: torch.dtype) -> nn.Sequential:
    """Convolutions 3 x 3 and 5 x 5, norms behind both, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 5, bias=False), nn.BatchNorm2d(6)),
        *(nn.Flatten(), nn.Linear(6, 5)),
    )
    return model.to(dtype)


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [0.1 * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def take(model: nn.Module, optimizer: ManifoldOptimizer, first: int, last: int) -> None:
    """Steps `first` to `last` of a run with everything that may happen to one: parameters without a gradient, a scaled
    gradient, one that overflowed, components that are not finite, a learning rate that changes."""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"].fill_(0.1 / (1 + step))
        overflow, scale = step == 3, 64.0 if step in (3, 4) else 1.0
        for position, (parameter, grad) in enumerate(zip(model.parameters(), gradients(model, step), strict=True)):
            parameter.grad = (grad * scale).to(parameter.dtype)
            if step == 2 and position in (0, 4):
                parameter.grad = None
        if step == 1:
            next(model.parameters()).grad[2, 1, 0, 0] = math.nan
        if scale != 1.0:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(overflow))
        optimizer.step()
        if scale != 1.0:
            del optimizer.grad_scale, optimizer.found_inf


def run(method: str, dtype: torch.dtype, backend: str, steps: int = 6) -> tuple[nn.Module, ManifoldOptimizer]:
    model, rate = network(dtype), torch.tensor(0.1, dtype=torch.float64)
    optimizer = METHODS[method](model, rate, backend=backend)
    take(model, optimizer, 0, steps)
    return model, optimizer


def numbers(model: nn.Module, optimizer: ManifoldOptimizer) -> dict[str, Tensor]:
    """Weights, momenta and variances by their names."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().double()
        for key, value in optimizer.state[parameter].items():
            found[f"{key} of {name}"] = value.double()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_runs_are_those_of_the_cpu_and_of_the_reference(method: str, dtype: torch.dtype) -> None:
    with in_place_of_the_cpu():
        launched()
        found = run(method, dtype, "cpu")
        assert launched()
    other, wanted = run(method, dtype, "cpu"), run(method, dtype, "reference")
    assert found[1].nonfinite_count() == other[1].nonfinite_count() == wanted[1].nonfinite_count() > 0
    # Six steps of a few dozen roundings of the arithmetic each; in 16 bits one rounding of the storage a step for the
    # weight and one for the momentum, of which a weight takes up to six at the learning rate, and a step that falls to
    # the other side of a tie takes one more.
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    bound = 500 * torch.finfo(arithmetic).eps + (12 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0)
    want = numbers(*wanted)
    for name, got in numbers(*found).items():
        size = float(want[name].abs().amax())
        assert float((got - want[name]).abs().amax()) <= bound * size, name
        assert float((got - numbers(*other)[name]).abs().amax()) <= bound * size, name


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_goes_on_with_the_same_bits(method: str) -> None:
    with in_place_of_the_cpu():
        model, optimizer = run(method, torch.float32, "cpu", steps=5)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        take(model, optimizer, 5, 7)
        again, rate = network(torch.float32), torch.tensor(0.1, dtype=torch.float64)
        resumed = METHODS[method](again, rate, backend="cpu")
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        take(again, resumed, 5, 7)
    wanted = numbers(model, optimizer)
    for name, got in numbers(again, resumed).items():
        assert torch.equal(got, wanted.pop(name)), name
    assert not wanted

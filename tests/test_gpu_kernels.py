"""Steps of the CUDA kernels on a GPU against the reference: the tests of the CPU kernels, and those of their contract.

Tensors lie on the CPU in those tests. ``step_`` takes their storages to the GPU, whole, so that every address keeps its
alignment and every gap its content, steps there, and brings the storages back.
"""

from __future__ import annotations

from functools import partial

import pytest
import test_cpu_contract as contract
import test_cpu_kernels as suite
import torch
from cpu_lockstep import check
from test_cpu_contract import (  # noqa: F401  the tests themselves
    test_buffers_are_not_read_before_the_first_step_nor_used_without_momentum,
    test_every_retraction_has_its_kernel,
    test_huge_gradients,
    test_momentum_that_float16_cannot_hold,
    test_neighbours_of_a_huge_gradient_keep_their_bits,
    test_neighbours_of_a_non_finite_gradient_keep_their_bits,
    test_psi_keeps_what_cannot_be_stored,
    test_steps_that_lose_the_weight,
    test_zero_and_denormal_gradients,
    test_zero_weights,
)
from test_cpu_kernels import *  # noqa: F403  the tests themselves
from torch import Tensor

from manifold_kernels import ops

if not torch.cuda.is_available():
    pytest.skip("there is no GPU; `make test-gpu` runs these tests where there is one", allow_module_level=True)

#: Of the operator's arguments, those that stay on the CPU: groups, components, scales, hyper.
ON_CPU = range(6, 10)


def moved(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage().cuda()
    there = torch.empty(0, dtype=tensor.dtype, device="cuda")
    there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return there


def step_(*arguments: list[Tensor | None] | Tensor | None) -> None:
    """The operator, on copies that lie on the GPU."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def take(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        pairs.append((tensor, moved(tensor.resolve_neg())))
        return pairs[-1][1]

    there = [
        argument
        if position in ON_CPU
        else [take(one) for one in argument]
        if isinstance(argument, (list, tuple))
        else take(argument)
        for position, argument in enumerate(arguments)
    ]
    assert ops.backends()["cuda"] is None
    torch.ops.manifold_kernels.step_(*there)
    for here, on_gpu in pairs:
        here.untyped_storage().copy_(on_gpu.untyped_storage())


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "check", partial(check, step=step_))
    monkeypatch.setattr(suite, "compiled", step_)
    monkeypatch.setattr(contract, "compiled", step_)

"""Steps through the optimizers by the CUDA backend, run on the CPU by the emulator: all tests of the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import pytest
from cuda_emulated import in_place_of_the_cpu, set_schedule
from test_optim_steps import *  # noqa: F403  the tests themselves

from manifold_kernels import ops

pytestmark = pytest.mark.parametrize("backend", ["cpu"])  # which the emulator takes the place of

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)
if (reason := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _by_the_emulator() -> Iterator[None]:
    with in_place_of_the_cpu():
        set_schedule(0)
        yield

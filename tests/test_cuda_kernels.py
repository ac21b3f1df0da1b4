"""Steps of the CUDA kernels, run on the CPU by the emulator, against the reference: all tests of the CPU kernels."""

from __future__ import annotations

from functools import partial

import cuda_emulated
import pytest
import test_cpu_kernels as suite
from cpu_lockstep import check
from cuda_emulated import set_schedule, step_
from test_cpu_kernels import *  # noqa: F403  the tests themselves

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "check", partial(check, step=step_))
    monkeypatch.setattr(suite, "compiled", step_)
    set_schedule(0)

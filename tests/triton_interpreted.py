"""The Triton backend under its interpreter, which is chosen when kernels are defined: import it from here in tests.

Other tests are not to find the interpreter by accident, so that the environment is as it was afterwards.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: E402, F401  imported at the first launch, by the same rule

from manifold_kernels.triton import decompositions, launch, planning  # noqa: E402

if before is None:
    del os.environ["TRITON_INTERPRET"]

step_ = launch.step_

__all__ = ["decompositions", "launch", "planning", "step_"]

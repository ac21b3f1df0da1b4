"""Which Triton is there, and whether its interpreter stands in for a GPU."""

from __future__ import annotations

import os

#: Versions that the kernels are compiled with in the tests.
OLDEST, BEYOND = (3, 6), (3, 9)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

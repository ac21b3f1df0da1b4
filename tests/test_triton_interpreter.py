"""What the interpreter had to be taught: one rounding in a multiply-add, and bfloat16 to the nearest."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton_interpreted  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from manifold_kernels.triton import interpreter

FLOATS = {np.float32: 32, np.float64: 64}


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_fma_rounds_once(dtype: type, data: st.DataObject) -> None:
    """Against exact fractions, cancellation and ties included; Python rounds a fraction to float64 once, and numpy's
    float32 is compared with the nearer of its neighbours."""
    moderate = st.floats(-1e8, 1e8, width=FLOATS[dtype]).filter(lambda x: x == 0 or abs(x) > 1e-8)
    x, y = data.draw(moderate), data.draw(moderate)
    z = data.draw(st.one_of(moderate, st.just(float(dtype(-x * y))), st.just(float(dtype(x * y)))))
    exact = Fraction(float(dtype(x))) * Fraction(float(dtype(y))) + Fraction(float(dtype(z)))
    got = interpreter.fma(np.array([x], dtype), np.array([y], dtype), np.array([z], dtype))[0]
    near = dtype(float(exact))
    candidates = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    distances = [abs(Fraction(float(c)) - exact) for c in candidates]
    assert abs(Fraction(float(got)) - exact) == min(distances)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    special = [0.0, -0.0, 1.0, float("inf"), -float("inf"), 3.3895e38, 1e-40, 1.00390625, 1.01171875, float("nan")]
    x = torch.cat([torch.tensor(special), torch.randn(10000) * torch.logspace(-38, 38, 10000)])
    got = interpreter.to_bfloat16(x.numpy())
    wanted = x.to(torch.bfloat16)
    back = torch.from_numpy(interpreter.from_bfloat16(got))
    assert torch.equal(back.isnan(), wanted.isnan())
    assert torch.equal(
        back.nan_to_num(0, posinf=1e38, neginf=-1e38), wanted.float().nan_to_num(0, posinf=1e38, neginf=-1e38)
    )

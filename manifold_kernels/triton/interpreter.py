"""Triton's interpreter, taught what the machines do.

It multiplies and adds in two roundings where ``tl.fma`` rounds once, cuts bfloat16 off where the machines round to the
nearest, and takes the truth of a comparison of scalars for a number of their type once it is spread over a block. With
that put right, kernels give the same bits as compiled ones, up to the order of sums and the last bit of sines. It is
loaded where ``TRITON_INTERPRET=1`` only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

Array = npt.NDArray[Any]


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b`` and its rounding error (Knuth)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def _to_odd(total: Array, error: Array) -> Array:
    """A sum rounded to odd: where it is not exact, of its two neighbours the one whose last bit is 1."""
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    return np.where(inexact, bits + towards, bits).view(np.float64)


def _split(a: Array) -> tuple[Array, Array]:
    high = a * 134217729.0  # 2^27 + 1 (Veltkamp)
    high = high - (high - a)
    return high, a - high


def fma(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` rounded once (Boldo & Melquiond 2008): exact product, sum rounded to odd, last rounding."""
    with np.errstate(all="ignore"):
        plain: Array = x * y + z
        if plain.dtype == np.float32:
            wide, other = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
            rounded: Array = _to_odd(*_two_sum(np.asarray(wide), np.asarray(other))).astype(np.float32)
            return np.where(np.isfinite(rounded), rounded, plain)
        if plain.dtype != np.float64:
            return plain
        x, y, z = np.broadcast_arrays(x, y, z)
        product = x * y
        (xh, xl), (yh, yl) = _split(x), _split(y)
        low = ((xh * yh - product) + xh * yl + xl * yh) + xl * yl
        first, first_error = _two_sum(z, low)
        total, error = _two_sum(product, first)
        exact = total + _to_odd(*_two_sum(error, first_error))
        return np.where(np.isfinite(exact), exact, plain)


def to_bfloat16(x: Array) -> Array:
    """The bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _cast(self: Any, source: Any, target: Any) -> Any:
    of, to = source.dtype.scalar, target.scalar
    if of == tl.float32 and to == tl.bfloat16:
        return interpreter.TensorHandle(to_bfloat16(source.data), to)
    if of == tl.bfloat16 and to == tl.float32:
        return interpreter.TensorHandle(from_bfloat16(source.data), to)
    with np.errstate(all="ignore"):
        return _plain_cast(self, source, target)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


def _truth(comparison: Any) -> Any:
    def compare(self: Any, x: Any, y: Any) -> Any:
        return interpreter.TensorHandle(comparison(self, x, y).data, tl.int1)

    return compare


_plain_cast = interpreter.InterpreterBuilder.cast_impl


def teach() -> None:
    """Put all of it right, in this process."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fma = _fma
    for name in [
        name for name in vars(interpreter.InterpreterBuilder) if name.startswith(("create_fcmp", "create_icmp"))
    ]:
        setattr(interpreter.InterpreterBuilder, name, _truth(getattr(interpreter.InterpreterBuilder, name)))

"""[FG] Eq. 31 in the words of ``torch.optim.SGD``, elementwise."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.tables import DAMPENING, MOMENTUM


@triton.jit
def coefficients(h, COMPUTE: tl.constexpr):
    """``momentum`` and ``1 - dampening``."""
    return tl.load(h + MOMENTUM).to(COMPUTE), (1.0 - tl.load(h + DAMPENING)).to(COMPUTE)


@triton.jit
def buffer(g, old, first, momentum, keep, STORE: tl.constexpr):
    """``M <- momentum M + (1 - dampening) G``, ``M = G`` at the first step, rounded to its storage type."""
    return tl.where(first, g, tl.fma(g, keep, old * momentum)).to(STORE)


@triton.jit
def direction(g, m, momentum, inverse, BUFFERED: tl.constexpr, NESTEROV: tl.constexpr):
    """What is stepped along, times the power of two ``inverse``, so that nothing overflows."""
    if NESTEROV:
        return tl.fma(m * inverse, momentum, g * inverse)
    elif BUFFERED:
        return m * inverse
    else:
        return g * inverse

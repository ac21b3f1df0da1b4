"""A step on the sphere and on Stiefel (retraction QR) in plain PyTorch, as one would write it by hand.

``w`` and ``m`` are rows ``(count, n)`` on the unit sphere or matrices ``(count, n, p)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from manifold_kernels.bench.methods import LR, MOMENTUM

Retraction = Callable[[Tensor, Tensor], Tensor]


def accumulate(grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
    """M <- momentum M + G."""
    for g, m in zip(grads, momenta, strict=True):
        m.mul_(MOMENTUM).add_(g)


def each(retract: Retraction, weights: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
    """Step every batch of ``weights`` along its momentum."""
    for w, m in zip(weights, momenta, strict=True):
        w.copy_(retract(w, m))


def _sphere(w: Tensor, m: Tensor) -> Tensor:
    y = w - LR * (m - w * (w * m).sum(1, keepdim=True))
    return functional.normalize(y, dim=1)


def _stiefel(w: Tensor, m: Tensor) -> Tensor:
    q, r = torch.linalg.qr(_along_tangent(w, m))
    return torch.mul(q, r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


def _along_tangent(w: Tensor, m: Tensor) -> Tensor:
    s = w.mT @ m
    return w - LR * (m - w @ (s + s.mT) / 2)


def _fusible_sphere(w: Tensor, m: Tensor) -> Tensor:
    """Short rows element by element, all rows at a time, since a compiler vectorises no loop over nine elements."""
    if w.shape[1] > 16:
        return _sphere(w, m)
    ws, ms = list(w.unbind(1)), list(m.unbind(1))
    along = _dot(ws, ms)
    ys = [a - LR * (b - a * along) for a, b in zip(ws, ms, strict=True)]
    length = _dot(ys, ys).rsqrt()
    return torch.stack([y * length for y in ys], 1)


def _fusible_stiefel(w: Tensor, m: Tensor) -> Tensor:
    """Gram-Schmidt up to 4x4, element by element; above it matrix products alone."""
    if max(w.shape[1:]) <= 4:
        return _gram_schmidt(w, m)
    y = _along_tangent(w, m)
    # X <- X (I - up(X^T X - I)), up the strict upper triangle and half the diagonal, converges to qf(Y) quadratically;
    # after a short step two are enough.
    for _ in range(2):
        excess = y.mT @ y - torch.eye(y.shape[2], device=y.device)
        y = y - y @ (excess.triu(1) + torch.diag_embed(excess.diagonal(dim1=-2, dim2=-1) / 2))
    return y


def _gram_schmidt(w: Tensor, m: Tensor) -> Tensor:
    n, p = w.shape[1:]
    ws, ms = ([[of[:, i, j] for i in range(n)] for j in range(p)] for of in (w, m))  # columns
    s = [[_dot(a, b) for b in ms] for a in ws]
    columns: list[list[Tensor]] = []
    for j in range(p):
        v = []
        for i in range(n):
            radial = _dot([ws[k][i] for k in range(p)], [s[k][j] + s[j][k] for k in range(p)]) / 2
            v.append(ws[j][i] - LR * (ms[j][i] - radial))
        for q in columns:
            along = _dot(q, v)
            v = [a - along * b for a, b in zip(v, q, strict=True)]
        length = _dot(v, v).rsqrt()
        columns.append([a * length for a in v])
    return torch.stack([columns[j][i] for i in range(n) for j in range(p)], 1).reshape(w.shape)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + x * y
    return total


#: For eager execution: few operations, those of the library.
BY_LIBRARY: Mapping[str, Retraction] = {"sphere": _sphere, "stiefel": _stiefel}

#: For torch.compile: what it can fuse.
FUSIBLE: Mapping[str, Retraction] = {"sphere": _fusible_sphere, "stiefel": _fusible_stiefel}

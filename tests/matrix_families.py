"""LAPACK's test matrices as batches, and how LAPACK judges a decomposition of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def families(n: int, p: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Matrices n x p of xCHKGE's types, and some more; each name has one matrix."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, p, dtype=torch.float64, generator=generator)
    k = min(n, p)
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    info = torch.finfo(dtype)
    zero, first, twice, row = a.clone(), a.clone(), a.clone(), a.clone()
    zero[:, p // 2] = 0
    first[:, 0] = 0
    twice[:, -1] = twice[:, 0]
    row[n // 2] = 0
    # Columns from 1e-30 to 1e30, in no order.
    sizes = torch.logspace(-30, 30, p, dtype=torch.float64)[torch.randperm(p, generator=generator)]

    def graded(smallest: float) -> Tensor:
        return u * torch.logspace(0, math.log10(smallest), k, dtype=torch.float64) @ vt

    matrices = {
        "random": a,
        "diagonal": torch.eye(n, p, dtype=torch.float64) * a,
        "negative": -torch.eye(n, p, dtype=torch.float64),
        "orthonormal": u @ vt,
        "upper": a.triu(),
        "condition 10": graded(0.1),
        "condition 0.1/eps": graded(10 * info.eps),
        "condition 1/eps^3": graded(info.eps**3),
        "near underflow": a * (16 * info.tiny / info.eps),
        "denormal": a * info.tiny / 16,
        "near overflow": a / a.abs().max() * (info.max / (16 * n)),
        "1e30": a * 1e30,
        "1e-30": a * 1e-30,
        "columns of many sizes": a * sizes,
        "zero column": zero,
        "first column zero": first,
        "zero row": row,
        "equal columns": twice,
        "rank one": a[:, :1] * a[:1] + 0 * a,
        "zero": torch.zeros(n, p, dtype=torch.float64),
    }
    return {name: matrix.to(dtype) for name, matrix in matrices.items()}


def one_norm(a: Tensor) -> Tensor:
    """The largest sum of a column's magnitudes, for every matrix."""
    return a.abs().sum(-2).amax(-1)


def lapack_unit(a: Tensor) -> float:
    """m eps, with m the longer side: what LAPACK's ratios are counted in."""
    return max(a.shape[-2:]) * torch.finfo(a.dtype).eps


def orthogonality(q: Tensor) -> Tensor:
    """``||I - Q^T Q||_1/(m eps)`` for every matrix, ``Q Q^T`` where n < p."""
    wide = q.shape[-2] < q.shape[-1]
    tall = (q.mT if wide else q).double()
    return one_norm(torch.eye(tall.shape[-1], dtype=torch.float64) - tall.mT @ tall) / lapack_unit(q)


def residual(a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``||A - left right||_1/(||A||_1 m eps)`` for every matrix, 0 where A = left right = 0.

    Everything is divided by the largest element first, so that no norm leaves the range.
    """
    largest = a.double().abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    scaled = a.double() / largest
    rest = one_norm(scaled - left.double() @ (right.double() / largest))
    return rest / torch.where(rest == 0, 1, one_norm(scaled)) / lapack_unit(a)

"""The operators behind :mod:`manifold_kernels.functional`: batched QR and polar decompositions.

``qr``, ``qf`` and ``polar`` take matrices ``(..., n, p)`` in float32 or float64 of any strides and return contiguous
tensors. The compiled extension implements them for the CPU and CUDA, torch's linear algebra everywhere else, on the
same contract: ``diag(r) >= 0``, orthonormal factors for any finite matrix, and NaN for a matrix with NaN or Inf.
Schemas, fake kernels, derivatives and batching rules stand here, once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_kernels import ops

_library = torch.library.Library("manifold_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("qr(Tensor x) -> (Tensor q, Tensor r)")  # type: ignore[no-untyped-call]
_library.define("qf(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("polar(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]


def _poison(x: Tensor) -> Tensor:
    """Zeros ``(..., 1, 1)``, NaN where the matrix has NaN or Inf."""
    return (0 * x).sum((-2, -1), keepdim=True)


def torch_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    poison = _poison(x)
    q, r = torch.linalg.qr(x + poison)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(x.dtype)
    return (q * sign.unsqueeze(-2) + poison).contiguous(), (r * sign.unsqueeze(-1)).contiguous()


def torch_qf(x: Tensor) -> Tensor:
    return torch_qr(x)[0]


def torch_polar(x: Tensor) -> Tensor:
    poison = _poison(x)
    u, _, vh = torch.linalg.svd(torch.where(poison == 0, x, 0), full_matrices=False)
    q: Tensor = (u @ vh + poison).contiguous()
    return q


def _qr_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    n, p = x.shape[-2:]
    k = min(n, p)
    return x.new_empty((*x.shape[:-2], n, k)), x.new_empty((*x.shape[:-2], k, p))


def _qf_fake(x: Tensor) -> Tensor:
    return _qr_fake(x)[0]


def _polar_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _qr_derivative(q: Tensor, r: Tensor, grad_q: Tensor, grad_r: Tensor) -> Tensor:
    """The gradient with respect to ``x = q r`` (Roberts & Roberts 2020, arXiv:2009.10071).

    ``(grad_q + q copyltu(M)) r^{-T}`` with ``M = r grad_r^T - grad_q^T q``, where copyltu mirrors the lower triangle.
    Of a wide ``x = [y z]`` the second part only meets ``r = [u v]`` in ``v = q^T z``.
    """
    k, p = r.shape[-2:]
    if k == p:
        m = r @ grad_r.mT - grad_q.mT @ q
        total = grad_q + q @ (m.tril() + m.tril(-1).mT)
        grad: Tensor = torch.linalg.solve_triangular(r.mT, total, upper=False, left=False)
        return grad
    u, v = torch.split(r, [k, p - k], -1)
    grad_u, grad_v = torch.split(grad_r, [k, p - k], -1)
    return torch.cat((_qr_derivative(q, u, grad_q + q @ v @ grad_v.mT, grad_u), q @ grad_v), -1)


class _Lyapunov(torch.autograd.Function):
    """The solution ``S`` of ``H S + S H = B`` for a symmetric positive definite ``H``.

    By eigenvalues, of which only sums appear, in the derivatives as well: automatic differentiation of the
    decomposition would divide by their differences. With ``T`` the solution for a gradient ``G`` instead of ``B``,
    the gradients are ``T`` for ``B`` and ``-(T S^T + S^T T)`` for ``H``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, b: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(h)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        s: Tensor = vectors @ ((vectors.mT @ b @ vectors) / sums) @ vectors.mT
        return s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, s = ctx.saved_tensors
        t: Tensor = _Lyapunov.apply(h, grad)  # type: ignore[no-untyped-call]
        return -(t @ s.mT + s.mT @ t), t


def _skew_lyapunov(h: Tensor, b: Tensor) -> Tensor:
    """The skew solution ``S`` of ``H S + S H = B`` for a symmetric positive definite ``H`` and a skew ``B``.

    Up to 3 x 3 without eigenvalues, for which the host would wait for a GPU: ``S`` and ``B`` are cross products with
    vectors, ``b = (tr(H) I - H) s``; of 2 x 2 matrices that leaves ``tr(H)``.
    """
    p = h.shape[-1]
    trace = h.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    if p <= 2:
        return b / trace
    if p > 3:
        s: Tensor = _Lyapunov.apply(h, b)  # type: ignore[no-untyped-call]
        return s
    vector = torch.stack((b[..., 2, 1], b[..., 0, 2], b[..., 1, 0]), -1).unsqueeze(-1)
    one = torch.eye(3, dtype=h.dtype, device=h.device)
    x, y, z = torch.linalg.solve_ex(trace * one - h, vector)[0].squeeze(-1).unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)


def _polar_derivative(x: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to ``x = q h``, h symmetric: ``q S + (I - q q^T) grad h^{-1}``.

    The skew ``S`` solves ``h S + S h = q^T grad - grad^T q``.
    """
    n, p = x.shape[-2:]
    if n < p:
        return _polar_derivative(x.mT, q.mT, grad.mT).mT
    a = q.mT @ grad
    h = q.mT @ x
    h = (h + h.mT) / 2
    turned: Tensor = q @ _skew_lyapunov(h, a - a.mT)
    if n == p:
        return turned
    normal: Tensor = torch.linalg.solve_ex(h, grad - q @ a, left=False)[0]
    return turned + normal


class _Qr(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        q, r = torch.ops.manifold_kernels.qr(x)
        return q, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> Tensor:
        q, r = ctx.saved_tensors
        return _qr_derivative(q, r, grad_q, grad_r)


class _Factor(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)


class _Qf(_Factor):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        q: Tensor = torch.ops.manifold_kernels.qf(x)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, q = ctx.saved_tensors
        r = (q.mT @ x).triu()
        return _qr_derivative(q, r, grad, torch.zeros_like(r))


class _Polar(_Factor):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        q: Tensor = torch.ops.manifold_kernels.polar(x)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, q = ctx.saved_tensors
        return _polar_derivative(x, q, grad)


def _over_batches(op: Any) -> Any:
    def batched(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Any, Any]:
        out = op(x.movedim(in_dims[0], 0))
        return out, (0, 0) if isinstance(out, tuple) else 0

    return batched


for _name, _kernel, _fake, _function in (
    ("qr", torch_qr, _qr_fake, _Qr),
    ("qf", torch_qf, _qf_fake, _Qf),
    ("polar", torch_polar, _polar_fake, _Polar),
):
    _qualified = f"manifold_kernels::{_name}"
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(_qualified, _fake, lib=_library)
    torch.library.register_autograd(_qualified, _function.backward, setup_context=_function.setup_context, lib=_library)
    torch.library.register_vmap(_qualified, _over_batches(getattr(torch.ops.manifold_kernels, _name)), lib=_library)

ops.extension_error()  # loads the extension, which registers the kernels


# The operators know their derivatives, but not torch.func's transforms of them; autograd functions do, and cost 30 µs.


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """``manifold_kernels::qr``, differentiable under torch.func as well."""
    if not x.requires_grad:
        return _Qr.forward(x)
    q, r = _Qr.apply(x)  # type: ignore[no-untyped-call]
    return q, r


def qf(x: Tensor) -> Tensor:
    """``manifold_kernels::qf``, differentiable under torch.func as well."""
    q: Tensor = _Qf.apply(x) if x.requires_grad else _Qf.forward(x)  # type: ignore[no-untyped-call]
    return q


def polar(x: Tensor) -> Tensor:
    """``manifold_kernels::polar``, differentiable under torch.func as well."""
    q: Tensor = _Polar.apply(x) if x.requires_grad else _Polar.forward(x)  # type: ignore[no-untyped-call]
    return q

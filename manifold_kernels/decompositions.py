"""The operators behind :mod:`manifold_kernels.functional`: batched QR and polar decompositions.

``qr``, ``qf`` and ``polar`` take matrices ``(..., n, p)`` in float32 or float64 of any strides and return contiguous
tensors. The compiled extension implements them for the CPU and CUDA, ``triton_qr`` and so on are those of the Triton
backend, and torch's linear algebra is the reference, on the same contract: ``diag(r) >= 0``, orthonormal factors for
any finite matrix, and NaN for a matrix with NaN or Inf. Schemas, fake kernels, derivatives and batching rules stand
here, once for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manifold_kernels import ops

_library = torch.library.Library("manifold_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
for _prefix in ("", "triton_"):
    _library.define(f"{_prefix}qr(Tensor x) -> (Tensor q, Tensor r)")  # type: ignore[no-untyped-call]
    _library.define(f"{_prefix}qf(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _library.define(f"{_prefix}polar(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]


def check_matrices(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``x`` holds matrices that are not empty, in float32 or float64."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: wanted float32 or float64, got {x.dtype}. Convert it with .float().")
    if x.dim() < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name}: wanted matrices (..., n, p) with n, p >= 1, got shape {tuple(x.shape)}. Unsqueeze vectors."
        )


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


def _triton(name: str, by_torch: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The operator ``name`` of the Triton backend; ``by_torch`` takes matrices that are too large for a program."""

    def kernel(x: Tensor) -> Any:
        check_matrices("x", x)
        _chosen("triton", None, x.device)
        from manifold_kernels.triton import decompositions as kernels

        return getattr(kernels, name)(x) if kernels.fits(x) else by_torch(x)

    return kernel


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
    def forward(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        q, r = _way("qr", backend)(x)
        return q, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def derivative(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> Tensor:
        q, r = ctx.saved_tensors
        return _qr_derivative(q, r, grad_q, grad_r)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> tuple[Tensor, None]:
        return _Qr.derivative(ctx, grad_q, grad_r), None


class _Factor(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)


class _Qf(_Factor):
    @staticmethod
    def forward(x: Tensor, backend: str) -> Tensor:
        q: Tensor = _way("qf", backend)(x)
        return q

    @staticmethod
    def derivative(ctx: Any, grad: Tensor) -> Tensor:
        x, q = ctx.saved_tensors
        r = (q.mT @ x).triu()
        return _qr_derivative(q, r, grad, torch.zeros_like(r))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Qf.derivative(ctx, grad), None


class _Polar(_Factor):
    @staticmethod
    def forward(x: Tensor, backend: str) -> Tensor:
        q: Tensor = _way("polar", backend)(x)
        return q

    @staticmethod
    def derivative(ctx: Any, grad: Tensor) -> Tensor:
        x, q = ctx.saved_tensors
        return _polar_derivative(x, q, grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Polar.derivative(ctx, grad), None


def _over_batches(op: Any) -> Any:
    def batched(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Any, Any]:
        out = op(x.movedim(in_dims[0], 0))
        return out, (0, 0) if isinstance(out, tuple) else 0

    return batched


_BY_TORCH: dict[str, Callable[[Tensor], Any]] = {"qr": torch_qr, "qf": torch_qf, "polar": torch_polar}


def _way(name: str, backend: str) -> Any:
    """The implementation of ``name`` by a backend."""
    if backend == "reference":
        return _BY_TORCH[name]
    return getattr(torch.ops.manifold_kernels, f"triton_{name}" if backend == "triton" else name)


for _name, _fake, _function in (("qr", _qr_fake, _Qr), ("qf", _qf_fake, _Qf), ("polar", _polar_fake, _Polar)):
    for _prefix, _kernel in (("", _BY_TORCH[_name]), ("triton_", _triton(_name, _BY_TORCH[_name]))):
        _own = _prefix + _name
        _qualified = f"manifold_kernels::{_own}"
        _library.impl(_own, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(_qualified, _fake, lib=_library)
        torch.library.register_autograd(
            _qualified, _function.derivative, setup_context=_function.setup_context, lib=_library
        )
        torch.library.register_vmap(_qualified, _over_batches(getattr(torch.ops.manifold_kernels, _own)), lib=_library)

ops.extension_error()  # loads the extension, which registers the kernels


@lru_cache(maxsize=64)
def _chosen(backend: str, environment: str | None, device: torch.device) -> str:
    """The backend that ``backend`` means; ``environment`` is what ``MANIFOLD_KERNELS_BACKEND`` says now."""
    return ops.chosen(backend, device)


def _backend(backend: str, device: torch.device) -> str:
    return _chosen(backend, os.environ.get("MANIFOLD_KERNELS_BACKEND"), device)


# Decided once for a graph: torch.compiler.assume_constant_result, which would import torch._dynamo, and Triton with it.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The operators know their derivatives, but not torch.func's transforms of them; autograd functions do, and cost 30 µs.


def qr(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``manifold_kernels::qr``, differentiable under torch.func as well."""
    name = _backend(backend, x.device)
    if not x.requires_grad:
        return _Qr.forward(x, name)
    q, r = _Qr.apply(x, name)  # type: ignore[no-untyped-call]
    return q, r


def qf(x: Tensor, backend: str = "auto") -> Tensor:
    """``manifold_kernels::qf``, differentiable under torch.func as well."""
    name = _backend(backend, x.device)
    q: Tensor = _Qf.apply(x, name) if x.requires_grad else _Qf.forward(x, name)  # type: ignore[no-untyped-call]
    return q


def polar(x: Tensor, backend: str = "auto") -> Tensor:
    """``manifold_kernels::polar``, differentiable under torch.func as well."""
    name = _backend(backend, x.device)
    q: Tensor = _Polar.apply(x, name) if x.requires_grad else _Polar.forward(x, name)  # type: ignore[no-untyped-call]
    return q

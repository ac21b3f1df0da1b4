"""The operator contract: one schema, implemented by every backend.

``step_`` takes a whole optimizer one step further. The lists run over the optimizer's parameters, in order:

* ``params``: the weights ``W``, written.
* ``grads``: their gradients ``G``, or ``None`` for a parameter that is skipped. Never written.
* ``momenta``: ``M`` ([FG] Eq. 31), ``u`` ([PSI] Eq. 11) or ``tau`` (SGD-G, Adam-G), written; shape, strides and dtype
  of the weight. An empty tensor where there is no momentum.
* ``variances``: Adam-G's scalar per component, float32 (float64 for float64), written; else an empty tensor.
* ``steps``: int64 ``(parameters,)``, incremented where there is a gradient. At 0 the momentum buffers are not read: the
  step is the first (``M = G``, as in torch).
* ``nonfinite``: int64 ``(parameters,)``, incremented by the number of components that were left as they were since
  their new momentum was not finite. Euclidean groups without a bound on the step size write such values through, as
  torch does.
* ``groups``, ``components``, ``scales``: the :class:`~manifold_kernels.plan.Plan`. ``hyper``: float64
  ``(parameter groups, len(HYPER_COLUMNS))``.
* ``norms``, optional: float64 ``(entries,)``, written: R of [FG] Theorem 1 for every FG-SGD group, the norm of the
  projected momentum that it steps along (of what torch's SGD steps along, in Euclidean groups), whether or not the step
  size depends on it. In the order of the plan, one entry for each group, and where the group is ``individual`` one for
  each of its components. A group's R leaves out the components that did not step. NaN where there is no R: for other
  rules, parameters without a gradient, groups without a component, individual components that did not step, and
  Euclidean groups that wrote NaN or Inf through. Beyond 1e154, where its square leaves float64, R may be infinite. The
  step is the same to the bit with and without ``norms``.
* ``grad_scale``, optional: float32, one number. Every gradient is divided by it before everything else, in the step's
  arithmetic; the gradient itself stays as it is.
* ``found_inf``, optional: float32, one number. Where it is not zero nothing is written, neither weights nor states nor
  ``steps`` nor ``nonfinite``; ``norms`` become NaN. Both are what ``torch.amp.GradScaler`` gives to torch's fused
  optimizers.
* ``live``, optional: a table like ``hyper``, whose numbers the step takes instead. ``hyper`` then only says which terms
  there are: whether momentum, weight decay, ``nesterov`` and ``maximize`` are zero. For numbers that only the device
  knows: learning rates in tensors there.

``steps``, ``nonfinite``, ``grad_scale``, ``found_inf`` and ``live`` lie on the parameters' device, where a step reads
them without waiting for it; ``groups``, ``components``, ``scales``, ``hyper`` and ``norms`` on the CPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from manifold_kernels.triton import support

SCHEMA = (
    "step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] momenta, Tensor(c!)[] variances, Tensor(d!) steps, "
    "Tensor(e!) nonfinite, Tensor groups, Tensor components, Tensor scales, Tensor hyper, Tensor(f!)? norms=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? live=None) -> ()"
)


class Step(Protocol):
    """A backend's ``step_``."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        variances: Sequence[Tensor],
        steps: Tensor,
        nonfinite: Tensor,
        groups: Tensor,
        components: Tensor,
        scales: Tensor,
        hyper: Tensor,
        norms: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        live: Tensor | None = None,
        /,
    ) -> None: ...


_library = torch.library.Library("manifold_kernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(SCHEMA)  # type: ignore[no-untyped-call]


def _step_fake(*args: object) -> None:
    return None


torch.library.register_fake("manifold_kernels::step_", _step_fake, lib=_library)

#: Backends in Python. Compiled graphs hold operators only, so that there each of them is one, of the same schema.
_IN_PYTHON = ("reference", "triton")


def _as_operator(backend: str) -> None:
    def step(*arguments: Any) -> None:
        resolve(backend, arguments[0][0].device)(*arguments)

    name = f"{backend}_step_"
    _library.define(SCHEMA.replace("step_", name, 1))  # type: ignore[no-untyped-call]
    _library.impl(name, step, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"manifold_kernels::{name}", _step_fake, lib=_library)


for _backend in _IN_PYTHON:
    _as_operator(_backend)


@lru_cache(maxsize=1)
def extension_error() -> str | None:
    """Why the compiled extension cannot be used, or ``None`` where it is loaded."""
    try:
        extension = importlib.import_module("manifold_kernels._C")
    except ImportError as error:
        return str(error)
    built, running = extension.build_info()["torch"], torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        return f"built with torch {built}, but {running} is running: build it again"
    return None


def cuda_error() -> str | None:
    """Why the CUDA kernels cannot be used, or ``None`` where they are compiled in and a GPU is there."""
    if (error := extension_error()) is not None:
        return error
    if "cuda" not in importlib.import_module("manifold_kernels._C").build_info():
        return "the compiled kernels were built without CUDA"
    return None if torch.cuda.is_available() else "there is no GPU"


@lru_cache(maxsize=1)
def _warn_reference() -> None:
    warnings.warn(
        f"manifold_kernels: the compiled CPU kernels are not there ({extension_error()}); steps run on the much slower "
        "reference backend. Build them with `pip install --no-build-isolation .` and a C++ compiler.",
        RuntimeWarning,
        stacklevel=3,
    )


def backends() -> dict[str, str | None]:
    """Every backend, with the reason why it cannot be used here (``None``: it can)."""
    return {
        "cuda": cuda_error(),
        "triton": support.missing(torch.cuda.is_available()),
        "cpu": extension_error(),
        "reference": None,
    }


#: What ``"auto"`` takes for tensors there: the first that can be used.
FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def automatic(device_type: str) -> str:
    """The backend that ``"auto"`` means: ``MANIFOLD_KERNELS_BACKEND``, or the fastest one for parameters there."""
    if (chosen := os.environ.get("MANIFOLD_KERNELS_BACKEND", "auto")) != "auto":
        return chosen
    known = backends()
    return next(name for name in FASTEST.get(device_type, ("reference",)) if known[name] is None)


def in_graphs(step: Step) -> Step:
    """``step`` as ``torch.compile`` may put it into a graph: the operator that it is or stands behind."""
    for backend in _IN_PYTHON:
        if step.__module__.startswith(f"manifold_kernels.{backend}"):
            operator: Step = getattr(torch.ops.manifold_kernels, f"{backend}_step_").default
            return operator
    operator = torch.ops.manifold_kernels.step_.default
    return operator


def chosen(backend: str, device: torch.device) -> str:
    """The name of the backend that ``backend`` means for tensors on ``device``.

    Raises:
        ValueError: no such backend, or one for another device.
        RuntimeError: a backend that cannot be used here, and why.
    """
    known = backends()
    if backend == "auto":
        backend = automatic(device.type)
    if backend not in known:
        raise ValueError(f"backend: wanted 'auto' or one of {list(known)}, got {backend!r}.")
    if known[backend] is not None:
        raise RuntimeError(f"backend: {backend!r} cannot be used here: {known[backend]}")
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and support.interpreted()):
        raise ValueError(
            f"backend: 'triton' needs parameters on a GPU, got {device}. Move them there, or set TRITON_INTERPRET=1"
            " before Python starts, which interprets it on the CPU, slowly."
        )
    if backend in ("cpu", "cuda") and device.type != backend:
        where = {"cpu": "the CPU", "cuda": "a GPU"}[backend]
        raise ValueError(f"backend: {backend!r} needs parameters on {where}, got {device}. Use backend='auto'.")
    return backend


def resolve(backend: str, device: torch.device) -> Step:
    """The step of ``backend`` (``"auto"``: ``MANIFOLD_KERNELS_BACKEND`` or the fastest for ``device``)."""
    name = chosen(backend, device)
    if name == "reference":
        if backend == "auto" and device.type == "cpu" and extension_error() is not None:
            _warn_reference()
        from manifold_kernels.reference import step_

        return step_
    if name == "triton":
        from manifold_kernels.triton.launch import step_ as triton_step

        return triton_step
    step: Step = importlib.import_module("manifold_kernels._C").step_  # the operator, called with less ado
    return step

"""How a parameter becomes matrices: strides, never a copy.

A :class:`Layout` says which elements of a parameter form one component matrix. Every parameter is first read in
the canonical order ``(G, D, C, *kernel)``: G channel groups (1 except in grouped transposed convolutions), D output
neurons and C inputs each, so that transposed convolutions differ from the others in this order only.

============  ==========================================  =======================
view          components                                  matrix ``n x p``
============  ==========================================  =======================
``kernel``    one per (output d, input c), ``d * C + c``  the two kernel dimensions
``filter``    one per ``rows`` consecutive outputs        ``(rows C prod(kernel)) x 1``
``matrix``    one                                         ``(C prod(kernel)) x (G D)``
``flat``      one (Euclidean parameters of any shape)     ``numel x 1``
============  ==========================================  =======================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers of the views in plans and kernels.
VIEWS: dict[str, int] = {"kernel": 0, "filter": 1, "matrix": 2, "flat": 3}


@dataclass(frozen=True)
class Layout:
    """Which elements of a parameter form one component.

    Args:
        view: ``"kernel"``, ``"filter"``, ``"matrix"`` or ``"flat"``.
        out_dim: the dimension of the output neurons: 0, or 1 for transposed convolutions.
        channel_groups: ``groups`` of a transposed convolution (others keep 1: their weight is already per group).
        rows: output neurons per component in the ``filter`` view (above 1 for weights behind a group or layer norm).
    """

    view: str
    out_dim: int = 0
    channel_groups: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise ValueError(f"view: wanted one of {list(VIEWS)}, got {self.view!r}.")
        if self.out_dim not in (0, 1):
            raise ValueError(f"out_dim: wanted 0 or 1, got {self.out_dim!r}.")
        if self.channel_groups < 1 or (self.channel_groups > 1 and self.out_dim == 0):
            raise ValueError(
                f"channel_groups: wanted 1 (or more, with out_dim=1), got {self.channel_groups} with "
                f"out_dim={self.out_dim}. Only transposed convolutions need it."
            )
        if self.rows < 1 or (self.rows > 1 and self.view != "filter"):
            raise ValueError(f"rows: wanted 1 (or more, in the 'filter' view), got {self.rows} in {self.view!r}.")


@dataclass(frozen=True)
class Shape:
    """Sizes of a parameter's components: ``count`` matrices ``n x p``; ``inputs`` is C, ``outputs`` is G D."""

    count: int
    n: int
    p: int
    inputs: int
    outputs: int


def _split(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor`` with dimension ``dim`` split in two, the second of length ``size``; a view."""
    shape = tensor.shape
    sizes = (*shape[:dim], shape[dim] // size, size, *shape[dim + 1 :])
    stride = tensor.stride()
    return tensor.as_strided(sizes, (*stride[:dim], stride[dim] * size, stride[dim], *stride[dim + 1 :]))


def canonical(tensor: Tensor, layout: Layout) -> Tensor:
    """``tensor`` seen as ``(G, D, C, *kernel)``, sharing its memory."""
    if tensor.dim() < 2:
        raise ValueError(
            f"view: {layout.view!r} needs a weight of two or more dimensions, got shape {tuple(tensor.shape)}. "
            "Leave biases and norm scales without a manifold."
        )
    if layout.out_dim == 0:
        return tensor.unsqueeze(0)
    groups = layout.channel_groups
    if tensor.shape[0] % groups:
        raise ValueError(f"channel_groups: wanted a divisor of {tensor.shape[0]} inputs, got {groups}.")
    return _split(tensor, 0, tensor.shape[0] // groups).transpose(1, 2)


def kernel_dims(canon: Tensor) -> list[int] | None:
    """The two dimensions of a canonical weight that make its kernels matrices, or ``None`` where there are not two."""
    if canon.dim() == 5:
        return [3, 4]
    kernel = [dim for dim in range(3, canon.dim()) if canon.shape[dim] > 1]
    return kernel if len(kernel) == 2 else None


def components(tensor: Tensor, layout: Layout) -> Tensor:
    """The components of ``tensor`` as a strided view, sharing its memory.

    Returns:
        a view with shape ``(batch..., n..., p...)``; :func:`shape_of` tells count, n and p, so that
        ``components(t, layout).reshape(count, n, p)`` is the batch of matrices (a copy where strides demand it).
    """
    if layout.view == "flat":
        return tensor.unsqueeze(0)
    canon = canonical(tensor, layout)
    if layout.view == "filter":
        if canon.shape[1] % layout.rows:
            raise ValueError(f"rows: wanted a divisor of {canon.shape[1]} outputs, got {layout.rows}.")
        return _split(canon, 1, layout.rows)
    if layout.view == "matrix":
        return canon.movedim((0, 1), (-2, -1))
    kernel = kernel_dims(canon)
    if kernel is None:
        raise ValueError(
            f"view: 'kernel' needs exactly two kernel dimensions above 1, got weight shape {tuple(tensor.shape)}. "
            "Use view='filter' or view='matrix'."
        )
    for dim in reversed(range(3, canon.dim())):
        if dim not in kernel:
            canon = canon.squeeze(dim)
    return canon


def shape_of(tensor: Tensor, layout: Layout) -> Shape:
    """Count and sizes of the components of ``tensor``; raises where the layout does not fit its shape."""
    if layout.view == "flat":
        return Shape(1, tensor.numel(), 1, 1, 1)
    sizes = components(tensor, layout).shape
    canon = canonical(tensor, layout).shape
    outputs, inputs = canon[0] * canon[1], canon[2]
    if layout.view == "kernel":
        return Shape(outputs * inputs, sizes[-2], sizes[-1], inputs, outputs)
    if layout.view == "filter":
        return Shape(outputs // layout.rows, math.prod(sizes[2:]), 1, inputs, outputs)
    return Shape(1, math.prod(sizes[:-2]), outputs, inputs, outputs)


def matrices(tensor: Tensor, layout: Layout) -> Tensor:
    """The components of ``tensor`` as one batch ``(count, n, p)`` (a copy where strides demand it)."""
    shape = shape_of(tensor, layout)
    return components(tensor, layout).reshape(shape.count, shape.n, shape.p)


def write_matrices(tensor: Tensor, layout: Layout, batch: Tensor) -> None:
    """Write ``batch (count, n, p)`` back into the components of ``tensor``, whatever its strides."""
    with torch.no_grad():
        view = components(tensor, layout)
        view.copy_(batch.reshape(view.shape))

"""Tensors from elsewhere: whether there is memory behind every one of their elements."""

from __future__ import annotations

import torch
from torch import Tensor


def check_memory(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value``, called ``name``, is a dense tensor that can be read to its last element.

    >>> tensor = torch.zeros(3)
    >>> check_memory("lr", tensor)
    >>> _ = tensor.untyped_storage().resize_(4)
    >>> check_memory("lr", tensor)
    Traceback (most recent call last):
        ...
    ValueError: lr: wanted 12 bytes of storage, got 4.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        raise ValueError(f"{name}: wanted a dense tensor with numbers in it, got {_described(value)}.")
    extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    needed = (value.storage_offset() + extent) * value.element_size() if value.numel() else 0
    if value.untyped_storage().nbytes() < needed:
        raise ValueError(f"{name}: wanted {needed} bytes of storage, got {value.untyped_storage().nbytes()}.")


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"one on the device {value.device}" if value.is_meta else f"one of the layout {value.layout}"

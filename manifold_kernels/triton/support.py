"""Which Triton is there, and whether its interpreter is to stand in for a GPU; without importing Triton."""

from __future__ import annotations

import os
from importlib import metadata

import torch

#: The versions of Triton that the kernels are tested with, the last one excluded, and the oldest of torch.
OLDEST, BEYOND = "3.6", "3.9"
OLDEST_TORCH = "2.13"


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` asks for the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def version() -> str | None:
    """Triton's version, or ``None`` where it is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def unsupported() -> str | None:
    """What is wrong with the versions of Triton and torch, or ``None``."""
    installed = version()
    if installed is None:
        return f"triton is not installed: pip install 'triton>={OLDEST},<{BEYOND}'"
    if not _numbers(OLDEST) <= _numbers(installed) < _numbers(BEYOND):
        return f"wanted triton >= {OLDEST}, < {BEYOND}, got {installed}"
    if _numbers(torch.__version__) < _numbers(OLDEST_TORCH):
        return f"wanted torch >= {OLDEST_TORCH}, got {torch.__version__}"
    return None


def missing(gpu: bool) -> str | None:
    """Why the backend cannot be used, or ``None``; ``gpu`` tells whether there is one."""
    if (reason := unsupported()) is not None:
        return reason
    if not gpu and not interpreted():
        return "there is no GPU; TRITON_INTERPRET=1 interprets it on the CPU, slowly"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor.

    >>> _numbers("3.6.0") < _numbers("3.10")
    True
    """
    return tuple(int(part) for part in version.split(".")[:2])

"""Which Triton is there, and whether its interpreter is to stand in for a GPU; without importing Triton."""

from __future__ import annotations

import os
from importlib import metadata

#: The versions that the kernels are tested with, the last one excluded.
OLDEST, BEYOND = "3.6", "3.9"


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` asks for the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(gpu: bool) -> str | None:
    """Why the backend cannot be used, or ``None``; ``gpu`` tells whether there is one."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return f"triton is not installed: pip install 'triton>={OLDEST},<{BEYOND}'"
    if not _numbers(OLDEST) <= _numbers(version) < _numbers(BEYOND):
        return f"wanted triton >= {OLDEST}, < {BEYOND}, got {version}"
    if not gpu and not interpreted():
        return "there is no GPU; TRITON_INTERPRET=1 interprets it on the CPU, slowly"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor.

    >>> _numbers("3.6.0") < _numbers("3.10")
    True
    """
    return tuple(int(part) for part in version.split(".")[:2])

"""What is installed, with what it was built and what it runs on."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path

import numpy
import torch

import manifold_kernels
from manifold_kernels import ops


def processor() -> str:
    """The name of the processor as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str]:
    """Processor, system and the versions that figures depend on."""
    return {
        "manifold_kernels": manifold_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "processors": str(processors()),
        "torch's threads": str(torch.get_num_threads()),
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
    }


def build() -> dict[str, str]:
    """What the compiled extension says about itself: compiler, torch, instruction set; empty where it is not there."""
    if ops.extension_error() is not None:
        return {}
    extension = importlib.import_module("manifold_kernels._C")
    return {str(key): str(value) for key, value in extension.build_info().items()}


def backends() -> dict[str, str]:
    """Every backend with ``"ready"`` or the reason why it cannot be used here."""
    return {name: reason or "ready" for name, reason in ops.backends().items()}

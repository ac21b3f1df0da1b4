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
from manifold_kernels.triton import support


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
        "triton": support.version() or "not installed",
        "system": platform.platform(),
        "processor": processor(),
        "processors": str(processors()),
        "torch's threads": str(torch.get_num_threads()),
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def build() -> dict[str, str]:
    """What the compiled extension says about itself: compiler, torch, instruction set; empty where it is not there."""
    try:
        extension = importlib.import_module("manifold_kernels._C")
    except ImportError:
        return {}
    facts = {str(key): str(value) for key, value in extension.build_info().items()}
    if not same_release(facts["torch"], torch.__version__):
        facts["torch"] += f", but {torch.__version__} is running: build it again"
    return facts


def same_release(one: str, other: str) -> bool:
    """Whether two versions agree in major and minor: releases of torch do not fit each other's extensions.

    >>> same_release("2.13.0+cpu", "2.13.1"), same_release("2.13.0", "2.14.0")
    (True, False)
    """
    return one.split(".")[:2] == other.split(".")[:2]


def backends() -> dict[str, str]:
    """Every backend with ``"ready"`` or the reason why it cannot be used here; what ``"auto"`` means, and why."""
    facts = {name: reason or "ready" for name, reason in ops.backends().items()}
    for device, where in (("cpu", "the CPU"), ("cuda", "a GPU")):
        why = f"the first of {', '.join(ops.FASTEST[device])} that can be used"
        if os.environ.get("MANIFOLD_KERNELS_BACKEND", "auto") != "auto":
            why = "MANIFOLD_KERNELS_BACKEND says so"
        facts[f"auto, on {where}"] = f"{ops.automatic(device)}: {why}"
    return facts

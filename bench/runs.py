"""Results as JSON files, one for each run, so that a set of runs that was interrupted goes on where it was."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifold_kernels import info


def file_name(name: str) -> str:
    """``name`` in small letters, digits and dashes.

    >>> file_name("PIO (Sp+Ob+St+Euc.)")
    'pio-sp-ob-st-euc'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in ``path``, ``None`` where there is no such file.

    Raises:
        ValueError: the file holds a run with other settings.
    """
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    found = content["settings"]
    other = {name: found.get(name) for name in settings if found.get(name) != settings[name]}
    if other:
        wanted = {name: settings[name] for name in other}
        raise ValueError(
            f"{path}: wanted a run with {wanted}, got one with {other}. "
            "Use the settings of that run, another --output, or delete the file."
        )
    return content["result"]


def save(path: Path, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write ``result`` beside the settings, the machine and the versions: the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "machine": info.machine(), "result": result}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

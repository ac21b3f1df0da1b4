"""The figures of a run with what they depend on, as a file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manifold_kernels import info
from manifold_kernels.bench.measure import Bandwidth, Result


@dataclass(frozen=True)
class Report:
    """A run of the benchmark.

    Attributes:
        machine: processor, system and versions.
        build: what the compiled extension says about itself.
        commit: of a checkout, ending in ``-dirty`` where files were changed since; ``None`` elsewhere.
        load: the system's load average when measuring began; others' processes take from both steps, but not alike.
        bandwidth: threads -> the memory's rates.
        results: in the order of measuring.
    """

    machine: dict[str, str]
    build: dict[str, str]
    commit: str | None
    load: float
    bandwidth: dict[int, Bandwidth]
    results: tuple[Result, ...]

    @classmethod
    def of(cls, results: Sequence[Result], bandwidth: dict[int, Bandwidth], load: float) -> Report:
        """``results`` of this machine."""
        return cls(info.machine(), info.build(), _commit(), load, bandwidth, tuple(results))

    def threads(self) -> list[int]:
        """The numbers of threads that were measured."""
        return sorted({line.threads for line in self.results})

    def markdown(self) -> list[str]:
        """Median ratios as the lines of a Markdown table: a row for each workload, one column a method."""
        ratios = {(line.workload, line.column, line.threads): line.ratio for line in self.results}
        columns = list(dict.fromkeys(line.column for line in self.results))
        rows = [["workload", *columns], ["---"] * (1 + len(columns))]
        for workload in dict.fromkeys(line.workload for line in self.results):
            keys = [[(workload, column, count) for count in self.threads()] for column in columns]
            cells = [" / ".join(short(ratios[key]) for key in cell if key in ratios) for cell in keys]
            rows.append([workload, *cells])
        return ["| " + " | ".join(row) + " |" for row in rows]

    def write(self, path: Path) -> None:
        """Write it to ``path`` as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report that was written to ``path``.

        Raises:
            ValueError: it is none of this version.
        """
        try:
            content = json.loads(path.read_text())
            content["bandwidth"] = {int(count): Bandwidth(**rates) for count, rates in content["bandwidth"].items()}
            content["results"] = tuple(
                Result(**{**line, "ratio_quartiles": tuple(line["ratio_quartiles"])}) for line in content["results"]
            )
            return cls(**content)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: wanted a report of this version's `manifold-kernels bench`: {error}.") from error


def short(ratio: float) -> str:
    """Three digits of a ratio.

    >>> short(0.983), short(14.53), short(322.7)
    ('0.98', '14.5', '323')
    """
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None

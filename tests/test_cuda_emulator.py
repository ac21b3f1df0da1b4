"""The emulator finds what it is there to find: kernels with one bug each, under the sanitizers that see it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_emulated
import pytest
from cuda_emulated import EMULATOR, FIBERS, ROOT, SANITIZERS, compiler

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the emulator cannot be compiled: {reason}", allow_module_level=True)

#: Bug, the sanitizer that finds it or "none" for the emulator itself, and its words.
BUGS = [
    ("missing_barrier", "thread", "data race"),
    ("missing_warp_barrier", "thread", "data race"),
    ("divergent_barrier", "none", "nothing goes on"),
    ("divergent_shuffle", "none", "exited"),
    ("shuffle_outside_of_its_mask", "none", "a shuffle reads a lane outside of its mask"),
    ("missing_wait_between_phases", "thread", "data race"),
    ("missing_fence_between_phases", "thread", "data race"),
    ("array_in_shared_beyond_its_end", "address", "use-after-poison"),
    ("dynamic_shared_beyond_its_end", "address", "heap-buffer-overflow"),
    ("global_beyond_its_end", "address", "heap-buffer-overflow"),
    ("no_blocks", "none", "wanted at least one block"),
    ("shared_that_nobody_asked_for", "none", "more than was asked for"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels, compiled with each sanitizer that the compiler has."""
    folder = tmp_path_factory.mktemp("bugs")
    found = {}
    for name, (everywhere, emulator) in SANITIZERS.items():
        flags = ["-std=c++20", "-O1", "-g1", "-DMK_EMULATED", f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}"]
        common = [*compiler().split(), *flags]
        fibers = {str(path): str(folder / f"{name}_{path.stem}.o") for path in FIBERS}
        commands = [[*common, *emulator.split(), "-c", source, "-o", made] for source, made in fibers.items()]
        bugs = str(EMULATOR / "seeded_bugs.cpp")
        commands.append([*common, *everywhere.split(), bugs, *fibers.values(), "-o", str(folder / name)])
        results = [subprocess.run(command, capture_output=True, text=True) for command in commands]
        if name == "none":
            assert all(result.returncode == 0 for result in results), results[-1].stderr
        if results[-1].returncode == 0:
            found[name] = folder / name
    return found


def run(program: Path, kernel: str, schedule: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    command = [str(program), kernel, str(schedule)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("schedule", [0, 1, 7])
@pytest.mark.parametrize(("bug", "sanitizer", "words"), BUGS)
def test_a_bug_is_found(programs: dict[str, Path], bug: str, sanitizer: str, words: str, schedule: int) -> None:
    if sanitizer not in programs:
        pytest.skip(f"{compiler()} has no -fsanitize={sanitizer}")
    done = run(programs[sanitizer], bug, schedule)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("schedule", [0, 1, 7])
def test_nothing_is_found_where_nothing_is_wrong(programs: dict[str, Path], schedule: int) -> None:
    for program in programs.values():
        for kernel in ("none", "no_bug_between_phases"):
            done = run(program, kernel, schedule)
            assert done.returncode == 0 and done.stdout == "2016\n", done.stderr[-2000:]


def test_a_missing_wait_shows_in_the_result(programs: dict[str, Path]) -> None:
    """What depends on the order of blocks is not the same in every schedule, which the kernels' own tests look at."""
    assert len({run(programs["none"], "missing_wait_between_phases", schedule).stdout for schedule in range(8)}) > 1


def test_shared_memory_that_nobody_has_written_is_nan(programs: dict[str, Path]) -> None:
    assert run(programs["none"], "uninitialised_shared", 0).stdout.strip().endswith("nan")

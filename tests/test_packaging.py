"""Building and installing: what is compiled with which flags, what happens without a compiler or torch, what is packed.

Builds run in a copy of the checkout. A script stands in for the compiler where only its commands matter.
"""

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_kernels import ops

ROOT = Path(__file__).parent.parent
KERNEL_PLATFORM = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
pytestmark = pytest.mark.skipif(not KERNEL_PLATFORM, reason="kernels are compiled on Linux, x86-64 and aarch64 only")

# Writes the object, the list of the files read (every header beside the source) and a line in the log.
COMPILER = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("stand-in 1.0")
    sys.exit()
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
out.write_text("object")
if "-c" in sys.argv:
    source = sys.argv[sys.argv.index("-c") + 1]
    shared = source.partition("/csrc/")[0] + "/csrc/shared.h"
    pathlib.Path(sys.argv[sys.argv.index("-MF") + 1]).write_text(f"{{out}}: {{source}} {{shared}}")
with pathlib.Path(__file__).with_name("log").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is kept in the repository, with three small sources for the C++ ones."""
    target = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "results", "*.so", "*.egg-info", "__pycache__", "csrc")
    shutil.copytree(ROOT, target, ignore=ignored)
    for name in ("ops.cpp", "cpu/isa/step.cpp", "shared.h"):
        (target / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (target / "csrc" / name).write_text("")
    return target


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "stand-in"
    path.write_text(COMPILER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(tree: Path, code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS")}
    kept.pop("MANIFOLD_KERNELS_SKIP_BUILD", None)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**kept, **environment}, capture_output=True, text=True
    )


WHEEL = "from setuptools import build_meta; build_meta.build_wheel('dist')"
SDIST = "from setuptools import build_meta; build_meta.build_sdist('dist')"
# An editable installation of the checkout would lend its extension to a package that has none.
UNAIDED = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]; "
NO_TORCH = "import sys; sys.modules['torch'] = None; "
BUILD = "import runpy, sys; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"


def configuration() -> dict[str, Any]:
    """``pyproject.toml``."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return parsed


def commands(tree: Path) -> list[str]:
    """What the stand-in was called with since the last look."""
    log = tree.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def build(tree: Path, compiler: Path, **environment: str) -> list[str]:
    done = run(tree, BUILD, CXX=str(compiler), **environment)
    assert done.returncode == 0, done.stderr
    return commands(tree)


def test_every_instruction_set_has_its_own_object_and_flags(tree: Path, compiler: Path) -> None:
    *compilations, link = build(tree, compiler)
    assert all("-ffp-contract=off" in line and "-fopenmp" in line for line in compilations)
    assert not any("fast-math" in line for line in compilations)
    assert sum("csrc/ops.cpp" in line for line in compilations) == 1
    kernels = {line.split("-DMK_ISA=")[1].split()[0]: line for line in compilations if "csrc/cpu/isa/step.cpp" in line}
    assert not any(word.startswith("-m") for word in kernels["baseline"].split())
    if os.uname().machine == "x86_64":
        assert kernels.keys() == {"baseline", "avx2", "avx512"}
        assert "-mavx2 -mfma" in kernels["avx2"] and "-mavx512f" not in kernels["avx2"]
        assert "-mavx512f" in kernels["avx512"]
        # The linker keeps the first of equal inline functions: it must be the one that runs everywhere.
        assert link.index("csrc/ops.o") < link.index("isa/baseline") < link.index("isa/avx2") < link.index("isa/avx512")


def test_only_what_changed_is_compiled_again(tree: Path, compiler: Path) -> None:
    everything = len(build(tree, compiler))
    assert build(tree, compiler) == []
    (tree / "csrc/ops.cpp").write_text("// changed")
    assert len(build(tree, compiler)) == 2
    (tree / "csrc/shared.h").write_text("// changed")
    assert len(build(tree, compiler)) == everything
    *compilations, _ = build(tree, compiler, CXXFLAGS="-O0 -g")
    assert len(compilations) == everything - 1
    assert all(line.split().index("-O3") < line.split().index("-O0") for line in compilations)  # the last one counts


def test_a_compiler_that_fails_fails_the_installation(tree: Path) -> None:
    done = run(tree, WHEEL, CXX="false")
    assert done.returncode != 0
    assert "the compiler failed" in done.stderr and "MANIFOLD_KERNELS_SKIP_BUILD=1" in done.stderr


def test_a_compiler_that_was_asked_for_must_be_there(tree: Path) -> None:
    done = run(tree, WHEEL, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CXX: wanted an installed C++ compiler, got 'no-such-compiler'" in done.stderr


def test_without_torch_the_build_stops_before_compiling_and_names_the_command(tree: Path, compiler: Path) -> None:
    done = run(tree, NO_TORCH + WHEEL, CXX=str(compiler))
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert commands(tree) == []


@pytest.mark.parametrize("jobs", ["0", "two"])
def test_max_jobs_must_be_a_number(tree: Path, compiler: Path, jobs: str) -> None:
    done = run(tree, WHEEL, CXX=str(compiler), MAX_JOBS=jobs)
    assert done.returncode != 0
    assert f"MAX_JOBS: wanted a whole number > 0, got '{jobs}'" in done.stderr


@pytest.mark.parametrize("how", [{"PATH": "/nowhere"}, {"MANIFOLD_KERNELS_SKIP_BUILD": "1"}])
def test_pure_python_wheel_runs_outside_the_source_tree(tree: Path, tmp_path: Path, how: dict[str, str]) -> None:
    done = run(tree, NO_TORCH + WHEEL, **how)
    assert done.returncode == 0, done.stderr
    assert "pure Python, no compiled kernels" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "manifold_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "bench", "examples", "csrc")) for name in names)
    code = UNAIDED + "from manifold_kernels.cli import app; app(['info'])"
    info = run(tmp_path, code, PYTHONPATH=str(tmp_path / "site"))
    assert info.returncode == 0, info.stderr
    assert "not there: pure Python" in info.stdout


def test_sdist_needs_no_torch_and_no_compiler_and_has_everything(tree: Path) -> None:
    done = run(tree, NO_TORCH + SDIST, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(tree).as_posix()
        for part in ("csrc", "tests", "examples")
        for path in tree.glob(f"{part}/**/*.*")
    }
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "manifold_kernels/py.typed"}
    assert wanted <= packed


def test_wheels_leave_out_the_libraries_that_torch_has() -> None:
    """A second libgomp in the process would have threads and settings of its own."""
    if ops.extension_error() is not None or shutil.which("readelf") is None:
        pytest.skip("there is no extension to look at, or no readelf to do it with")
    listed = subprocess.run(
        ["readelf", "-d", str(import_module("manifold_kernels._C").__file__)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed))
    of_torch = {path.name for path in Path(torch.__file__).parent.glob("lib/*.so*")}
    command = configuration()["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    excluded = re.findall(r"--exclude '(.+?)'", command)
    assert any(name.startswith("libgomp") for name in needed & of_torch)
    for name in needed & of_torch:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in excluded), name


def test_wheels_are_built_and_tested_with_one_torch() -> None:
    """The version in two places of cibuildwheel's table, of the Makefile, and in range of what is installed with it."""
    wheels = configuration()["tool"]["cibuildwheel"]
    (built,) = re.findall(r"torch==(\S+)", wheels["before-build"])
    assert wheels["test-requires"] == [f"torch=={built}"]
    assert f"TORCH ?= torch=={built}" in (ROOT / "Makefile").read_text().splitlines()
    (minimum,) = re.findall(r"torch>=(\S+)", " ".join(configuration()["project"]["dependencies"]))
    assert torch.torch_version.TorchVersion(built) >= minimum


@pytest.mark.long
def test_compiled_wheel_runs_outside_the_source_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "results", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    done = run(tree, WHEEL)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import manifold_kernels as m; from manifold_kernels import ops; print(m.__file__, ops.extension_error())"
    used = run(tmp_path, UNAIDED + code, PYTHONPATH=str(tmp_path / "site"))
    assert used.stdout.split() == [str(tmp_path / "site/manifold_kernels/__init__.py"), "None"], used.stderr

"""The examples run, and show what they say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str, **options: object) -> object:
    """What ``main(**options)`` of an example returns, with ``arguments`` on its command line."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name))["main"](**options)


def test_first_step_learns_and_keeps_its_constraint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("first_step.py", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in lines]
    violations = [float(line.split()[-1]) for line in lines]
    assert losses[-1] < 0.1 * losses[0]
    assert max(violations) < 1e-6  # elements of a 3x3 Gram matrix, eps 1.2e-7: three products and the rounding of W


@pytest.mark.parametrize("trainer", ["lightning", "accelerate"])
def test_trainers_learn_and_keep_the_constraint(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(trainer, reason=f"{trainer} is not installed")
    losses, violation = run(f"with_{trainer}.py", monkeypatch)
    assert losses[-1] < 0.2 * losses[0]
    assert violation < 1e-6


def test_principal_directions_are_the_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("principal_directions.py", monkeypatch) == pytest.approx(1, abs=1e-9)


def test_psi_does_not_feel_the_scale_of_a_layer_and_sgd_does(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = run("train_digits_psi.py", monkeypatch, "--epochs", "1", "--alpha", "4096")
    # A power of two changes no digit of any number on the way: the same network to the last bit.
    assert errors["PSI-SGD 4096"] == errors["PSI-SGD 1"] < 15
    assert errors["SGD 4096"] > errors["SGD 1"] + 5


def test_the_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    first, collections = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(first, names)
    assert float(capsys.readouterr().out) < 1e-6
    exec(collections, names)  # of the same model
    assert (tmp_path / "results" / "pio.png").read_bytes().startswith(b"\x89PNG")

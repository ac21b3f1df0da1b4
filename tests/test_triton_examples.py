"""The examples as they are, stepped by the Triton backend under its interpreter: the environment chooses it."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import (  # noqa: F401  the tests themselves
    EXAMPLES,
    run,
    test_first_step_learns_and_keeps_its_constraint,
    test_the_examples_of_the_readme_run,
    test_trainers_learn_and_keep_the_constraint,
)
from triton_interpreted import launch


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chosen for every optimizer that is left to choose, and taken."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    taken = []
    step = launch._run
    monkeypatch.setattr(launch, "_run", lambda *arguments: taken.append(True) or step(*arguments))
    yield
    assert taken


def test_principal_directions_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    got = run("principal_directions.py", monkeypatch, steps=10)
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "reference")
    # Float64, ten steps, each of them with a few dozen roundings.
    assert got == pytest.approx(run("principal_directions.py", monkeypatch, steps=10), abs=1e-12)


def test_digits_are_learnt_as_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--epochs", "1", "--alpha", "64", "--images", "200")
    got = run("train_digits_psi.py", monkeypatch, *arguments)
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "reference")
    # In % of 1,000 images, of which rounding may turn one that lies between two digits.
    assert got == pytest.approx(run("train_digits_psi.py", monkeypatch, *arguments), abs=0.11)


def test_psi_trains_alike_from_both_starts(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "unbalanced_start.py"))["main"]
    main.__globals__["RATES"] = (0.1,)
    result = main(iterations=10, batch=64, hidden=4, alpha=256.0, output=tmp_path)
    differences = result["largest relative difference of the curves"]
    assert differences["PSI-SGD"] == differences["PSI-SGDM"] == 0 < differences["SGD"]


def test_the_toy_problem_is_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every method reaches in two iterations."""
    main = runpy.run_path(str(EXAMPLES / "toy_problem.py"))["main"]
    names = main.__globals__
    names["METHODS"] = {
        name: replace(method, rates=(method.paper_rate,))
        for name, method in names["METHODS"].items()
        if name[-1] == "G"
    }
    sizes: dict[str, Any] = {"iterations": 2, "every": 1, "batch": 32, "samples": 64, "hidden": 8}
    sizes |= {"seeds": 1, "tuning_seeds": 1, "rest_full": 0.02, "rest_mini": 0.003}
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", backend)
        found.append(main(**sizes, output=tmp_path)["results"])
    for title, by in found[0].items():
        for name, one in by.items():
            for measure, mean in one["geometric_means"].items():
                assert mean == pytest.approx(found[1][title][name]["geometric_means"][measure], rel=1e-9)

"""The API reference is made of docstrings: it builds, and every public name is in it with what it computes."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest

import manifold_kernels
from manifold_kernels import functional, manifolds, ops, optim


def test_every_public_name_is_described() -> None:
    described = [getattr(manifold_kernels, name) for name in manifold_kernels.__all__]
    described += [getattr(optim, name) for name in optim.__all__]
    described += [value for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"]
    for thing in described:
        if not isinstance(thing, str):
            assert len(inspect.getdoc(thing) or "") > 20, thing
    for method in ("step", "state_dict", "load_state_dict", "rebind", "violation", "check", "add_param_group"):
        assert optim.ManifoldOptimizer.__dict__.get(method, getattr(optim.ManifoldOptimizer, method)).__doc__, method


def test_pdoc_builds_it(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="restructuredtext")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        modules = ["manifold_kernels.optim.fgsgd", *(each.__name__ for each in (functional, manifolds, ops))]
        pdoc.pdoc(*modules, output_directory=tmp_path)
    page = (tmp_path / "manifold_kernels" / "optim" / "fgsgd.html").read_text(encoding="utf-8")
    assert "theta_mu of Eq. 31" in page and "rescale" in page

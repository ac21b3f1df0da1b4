"""The blocks of ``docs/migration.md`` run, and the two sides of a comparison compute the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manifold_kernels import FGSGD, functional, param_groups
from manifold_kernels.manifolds import Stiefel

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))


def run(name: str, **changes: str) -> dict[str, Any]:
    code = BLOCKS[name]
    for old, new in changes.values():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_geoopt_and_here_reach_the_same_matrix() -> None:
    pytest.importorskip("geoopt")
    theirs, ours = run("geoopt")["weight"].detach(), run("here")["weight"].detach().mT
    nearest = functional.polar(run("here")["target"])
    # 300 steps contract by about sqrt(0.9) each: 1e-7 is left, and rounding of gradients of size 10 by 6e-8.
    assert torch.allclose(theirs, nearest, atol=1e-4) and torch.allclose(ours, nearest, atol=1e-4)


def test_steps_agree_without_momentum() -> None:
    pytest.importorskip("geoopt")
    less = {"momentum": (", momentum=0.9", ""), "steps": ("range(300)", "range(3)")}
    theirs, ours = run("geoopt", **less)["weight"].detach(), run("here", **less)["weight"].detach().mT
    assert torch.allclose(theirs, ours, rtol=0, atol=30 * torch.finfo(torch.float32).eps)  # ten roundings a step


@pytest.mark.parametrize("name", ["parametrized", "plain"])
def test_both_train_an_orthogonal_layer(name: str) -> None:
    names = run(name)
    model, optimizer = names["model"], names["optimizer"]
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    y = x[:, :1].sin()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    gram = model[0].weight @ model[0].weight.mT
    scale = gram.diagonal().mean()
    # Eight products in a sum, and the matrix exponential's own roundings.
    assert torch.allclose(gram / scale, torch.eye(8), rtol=0, atol=1e-5)


def test_a_parametrized_model_goes_on_without() -> None:
    names = run("parametrized")
    model = names["model"]
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    before = model[0].weight.detach().clone()
    rules = {"0.weight": {"manifold": Stiefel(), "view": "matrix"}}
    optimizer = FGSGD(param_groups(model, None, rules=rules), lr=0.1)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.allclose(model[0].weight, before, rtol=0, atol=1e-6) and optimizer.violation() < 1e-6

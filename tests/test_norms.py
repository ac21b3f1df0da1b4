"""Norms against numpy, bounds against points that reach them, Proposition 1 of [FG], and Table I against mpmath."""

from __future__ import annotations

import io
import math
from dataclasses import astuple
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.linalg import hadamard
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, SGDG, partition
from manifold_kernels.functional import project_weight_
from manifold_kernels.generalization import generalization_bounds, table1
from manifold_kernels.manifolds import Euclidean, Grassmann, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.norms import claimed_two_to_one, matrix_norms, norm_bounds, norms_table, weight_norms
from manifold_kernels.renormalize import Renormalizer
from manifold_kernels.routing import param_groups
from manifold_kernels.views import Layout

CONSTRAINED = ("sphere", "oblique", "stiefel")
# Norms of at most 30 x 30 float64 matrices by two routes: sums of 900 terms and a Gram matrix, each a few hundred
# roundings of 1.1e-16 relative to the norm.
CLOSE = 1e-12


def by_numpy(x: Tensor) -> list[float]:
    """The three norms of one matrix, by an SVD and Python sums."""
    array = x.detach().double().numpy()
    rows = [math.sqrt(math.fsum(float(value) ** 2 for value in row)) for row in array]
    return [float(np.linalg.norm(array)), float(np.linalg.svd(array, compute_uv=False)[0]), math.fsum(rows)]


def extremal(manifold: str, n: int, p: int) -> Tensor:
    """A point of scale 1 that reaches all bounds; sizes are powers of two."""
    if manifold == "sphere":
        return torch.full((n, p), 1 / math.sqrt(n * p), dtype=torch.float64)
    if manifold == "oblique":
        return torch.full((n, p), 1 / math.sqrt(n), dtype=torch.float64)
    size = max(n, p)
    return torch.from_numpy(hadamard(size)[:n, :p] / math.sqrt(size))


def kernels(manifold: str, count: int, n: int, p: int, scale: float = 1.0) -> Tensor:
    """Random points ``(count, 1, n, p)``: a weight of one input channel."""
    weight = torch.randn(count, 1, n, p, dtype=torch.float64)
    project_weight_(manifold, weight, Layout("kernel"), scale)
    return weight


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=30)
def test_matrix_norms_are_those_of_numpy(n: int, p: int) -> None:
    batch = torch.randn(2, n, p, dtype=torch.float64)
    for got, x in zip(matrix_norms(batch).tolist(), batch, strict=True):
        assert got == pytest.approx(by_numpy(x), rel=CLOSE)


def test_a_matrix_that_is_not_finite_has_a_norm_of_nan_and_its_neighbours_have_theirs() -> None:
    batch = torch.randn(3, 4, 2)
    want = matrix_norms(batch)
    batch[1, 0, 0] = math.nan
    batch[2, 0, 0] = math.inf
    got = matrix_norms(batch)
    assert torch.equal(got[0], want[0])
    assert bool(got[1:, 1].isnan().all())


@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [(8, 1), (4, 4), (8, 2), (2, 8)])
def test_bounds_are_reached(manifold: str, n: int, p: int) -> None:
    assert by_numpy(extremal(manifold, n, p)) == pytest.approx(norm_bounds(manifold, n, p), rel=CLOSE)


@given(st.sampled_from(CONSTRAINED), st.integers(2, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=60)
def test_points_and_their_products_are_within_bounds(manifold: str, n: int, p: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    scales = torch.rand(count, dtype=torch.float64) + 0.1
    batch = torch.cat([kernels(manifold, 1, n, p, float(s)) for s in scales])[:, 0]
    bounds = torch.tensor(norm_bounds(manifold, n, p), dtype=torch.float64)
    for x, s in zip(batch, scales, strict=True):
        assert all(np.array(by_numpy(x)) <= (s * bounds).numpy() * (1 + CLOSE))
    beside = torch.cat(list(batch), dim=1)
    joint = math.sqrt(math.fsum(float(s) ** 2 for s in scales))
    assert all(np.array(by_numpy(beside)) <= joint * bounds.numpy() * (1 + CLOSE))


def test_the_papers_two_to_one_norms_are_exceeded() -> None:
    stiefel = matrix_norms(kernels("stiefel", 5, 3, 3))[:, 0, 2]
    assert stiefel.tolist() == pytest.approx([3.0] * 5, rel=CLOSE)
    assert claimed_two_to_one("stiefel", 3) < 1.4
    assert all(by_numpy(extremal(name, 4, 2))[2] > 1.5 * claimed_two_to_one(name, 2) for name in CONSTRAINED)


def test_bounds_of_other_sets() -> None:
    assert norm_bounds("grassmann", 4, 1) == pytest.approx((1, 1, 2))
    assert norm_bounds("euclidean", 2, 2) == norm_bounds("scale_invariant", 2, 1) == (math.inf,) * 3
    assert claimed_two_to_one("euclidean", 3) == math.inf
    with pytest.raises(ValueError, match="manifold: wanted one of"):
        norm_bounds("torus", 2, 2)


def optimizer_of(model: nn.Module, scheme: str = "pio", **options: Any) -> FGSGD:
    """Spheres, oblique and Stiefel manifolds and Euclidean spaces in every convolution."""
    groups = partition(model, scheme, ["sphere", "oblique", "stiefel", None], seed=3, **options)
    return FGSGD(groups, lr=0.1, backend="reference")


@pytest.mark.parametrize("scheme", ["po", "pi", "pio", "individual"])
def test_every_component_and_group_of_a_collection_is_measured(scheme: str) -> None:
    model = nn.Conv2d(7, 6, (3, 2))
    optimizer = optimizer_of(model, scheme)
    weight, plan = model.weight, optimizer.plan
    seen = torch.zeros(42)
    groups = 0
    for found in weight_norms(optimizer):
        groups += len(found.groups)
        assert (found.n, found.p) == (3, 2)
        for at, number in enumerate(found.members.tolist()):
            kernel = weight[number // 7, number % 7]
            seen[number] += 1
            assert found.components[at].tolist() == pytest.approx(by_numpy(kernel), rel=CLOSE)
        for row in set(found.rows.tolist()):
            members = plan.members(row).tolist()
            alone = int((found.rows == row).sum()) > 1  # groups of one component share a row
            sets = [[each] for each in members] if alone else [members]
            want = [by_numpy(torch.cat([weight[k // 7, k % 7] for k in one], dim=1)) for one in sets]
            got = found.groups[found.rows == row].tolist()
            assert np.array(sorted(got)) == pytest.approx(np.array(sorted(want)), rel=CLOSE)
        assert found.holds
        bounded = bool(found.component_bounds.isfinite().all()) and bool(found.group_bounds.isfinite().all())
        assert bounded == (found.manifold != "euclidean")
    assert bool((seen == 1).all())
    assert groups == len(optimizer.param_groups[0]["assignments"][0].manifolds)


def test_bounds_follow_the_scale_of_every_component() -> None:
    model = nn.Conv2d(7, 6, (3, 2)).double()
    optimizer = optimizer_of(model)
    optimizer.rescale(model.weight, torch.rand(42, dtype=torch.float64) + 0.1)
    for found in weight_norms(optimizer):
        if found.manifold != "euclidean":  # whose points all have the Frobenius norm that bounds it, as their products
            assert torch.allclose(found.components[:, 0], found.component_bounds[:, 0], rtol=CLOSE)
            assert torch.allclose(found.groups[:, 0], found.group_bounds[:, 0], rtol=CLOSE)
        assert found.holds


@pytest.mark.parametrize(
    ("layer", "view", "matrix"),
    [
        (nn.Conv2d(3, 4, 3), "filter", lambda w: w.flatten(1).T),
        (nn.Conv2d(3, 4, 3), "matrix", lambda w: w.flatten(1).T),
        (nn.ConvTranspose2d(3, 4, 3), "filter", lambda w: w.transpose(0, 1).flatten(1).T),
        (nn.Linear(5, 4), "matrix", lambda w: w.T),
    ],
)
def test_a_group_of_filters_is_the_matrix_view(layer: nn.Module, view: str, matrix: Any) -> None:
    optimizer = FGSGD(param_groups(layer, "sphere", linear="sphere", view=view), lr=0.1, backend="reference")
    [found] = weight_norms(optimizer)
    assert found.groups[0].tolist() == pytest.approx(by_numpy(matrix(layer.weight)), rel=CLOSE)
    assert found.name == "weight"
    assert found.holds


def test_scale_invariant_and_grassmann_weights_are_measured() -> None:
    for kind, of in ((PSISGD, ScaleInvariant()), (SGDG, Grassmann())):
        weight = nn.Parameter(torch.randn(4, 6))
        project_weight_(of, weight, Layout("filter"))
        optimizer = kind([{"params": [weight], "manifold": of}], lr=0.1, backend="reference")
        [found] = weight_norms(optimizer)
        assert found.components[1].tolist() == pytest.approx(by_numpy(weight[1, :, None]), rel=CLOSE)
        assert found.name == "param group 0, parameter 0"
        assert found.holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.2, math.nan])
def test_violations_are_found_and_marked(dtype: torch.dtype, factor: float) -> None:
    model = nn.Conv2d(4, 4, 3).to(dtype)
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.1, backend="reference")
    [before] = weight_norms(optimizer)
    assert before.holds
    assert "!" not in rendered(norms_table([before]))
    with torch.no_grad():
        model.weight[2, 1] *= factor
    [after] = weight_norms(optimizer)
    assert not after.holds
    assert after.component_violations.any(1).nonzero().flatten().tolist() == [9]
    assert "!" in rendered(norms_table([after]))
    if math.isnan(factor):
        assert bool(after.group_violations.any())


def rendered(table: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_counts_what_exceeds_the_papers_claim() -> None:
    model = nn.Conv2d(4, 4, 3)
    text = rendered(norms_table(weight_norms(optimizer_of(model))))
    assert "stiefel" in text
    assert "4 of 4" in text  # 3 x 3 Stiefel kernels, which all exceed it
    assert "euclidean" in text


# -- [FG] Proposition 1 ------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 6)


def renormalized(layer: nn.Module, groups: list[dict[str, Any]], size: int) -> FGSGD:
    optimizer = FGSGD(groups, lr=0.1, backend="reference")
    renormalizer = Renormalizer(layer, optimizer)
    renormalizer.trace(torch.zeros(1, layer.in_channels, size, size, dtype=layer.weight.dtype))
    renormalizer.step()
    return optimizer


def put_extremal_(weight: Tensor, manifold: str) -> None:
    """Every kernel where its norms are largest, up to rotation for Stiefel, whose Frobenius norm they all have."""
    if manifold != "stiefel":
        with torch.no_grad():
            weight.fill_(1.0)
        project_weight_(manifold, weight, Layout("kernel"), 1.0)


@given(SIZES, SIZES, st.integers(2, 4), st.integers(2, 4), SIZES, st.sampled_from(CONSTRAINED), st.booleans())
@settings(max_examples=40)
def test_proposition_1_holds_for_kernels_and_filters(
    d: int, c: int, a: int, b: int, size: int, manifold: str, extreme: bool
) -> None:
    for view in ("kernel", "filter"):
        of = manifold if view == "kernel" else "sphere"
        layer = nn.Conv2d(c, d, (a, b)).double()
        groups = param_groups(layer, {"sphere": Sphere(), "oblique": Oblique(), "stiefel": Stiefel()}[of], view=view)
        if extreme and view == "kernel":
            put_extremal_(layer.weight, of)
        [found] = weight_norms(renormalized(layer, groups, size + 3))
        assert bool((found.components <= 1 + CLOSE).all())
        assert found.components_at_most_one
        outputs = (size + 4 - a) * (size + 4 - b) * d
        if d * c * a * b <= c * a * b + outputs:  # the layer is one group of K = D C kernels
            assert found.groups_at_most_one


@given(SIZES, st.integers(4, 9), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=30)
def test_groups_within_an_output_are_at_most_one(d: int, c: int, size: int, seed: int) -> None:
    layer = nn.Conv2d(c, d, 3)
    groups = partition(layer, "po", ["sphere", "oblique", "stiefel"], seed=seed)
    for found in weight_norms(renormalized(layer, groups, size + 2)):
        assert found.groups_at_most_one


@given(st.integers(2, 60), st.integers(1, 6), st.integers(1, 3), st.sampled_from(CONSTRAINED))
@settings(max_examples=40)
def test_groups_within_an_input_are_at_most_one_where_they_are_small(d: int, c: int, size: int, of: str) -> None:
    layer = nn.Conv2d(c, d, 3)
    groups = partition(layer, "pi", [of], seed=0)
    [found] = weight_norms(renormalized(layer, groups, size + 2))
    if 9 * d <= 9 * c + size * size * d:
        assert found.groups_at_most_one


def test_a_whole_layer_is_not() -> None:
    layer = nn.Conv2d(512, 512, 3, padding=1, bias=False)
    [found] = weight_norms(renormalized(layer, param_groups(layer, "stiefel"), 7))
    assert found.components_at_most_one
    assert not found.groups_at_most_one
    assert float(found.groups[0, 0]) == pytest.approx(5.15, abs=0.01)  # 512 sqrt(3/(4608 + 25088))
    assert found.holds


# -- [FG] Table I ------------------------------------------------------------------------------------------------------


def directly(layers: list[Tensor], samples: int, width: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """The expressions as Table I prints them, in 60 digits and without logarithms."""
    exact = [[[mpmath.mpf(norm) for norm in group] for group in layer.tolist()] for layer in layers]
    depth, root = len(layers), mpmath.sqrt(samples)
    every = mpmath.fprod(mpmath.fprod(group[1] for group in layer) for layer in exact)
    first = 2**depth * mpmath.fprod(mpmath.fprod(group[0] for group in layer) for layer in exact) / root
    second = mpmath.fsum(
        mpmath.fprod(mpmath.power(group[2] / group[1], mpmath.mpf(2) / 3) for group in layer) for layer in exact
    )
    third = mpmath.fsum(mpmath.fprod(group[0] ** 2 / group[1] ** 2 for group in layer) for layer in exact)
    return (
        first,
        every / root * mpmath.power(second, mpmath.mpf(3) / 2),
        every / root * mpmath.sqrt(depth**2 * width * third),
    )


@pytest.mark.parametrize("sizes", [[1], [3, 1, 5], [2000, 700, 1]])
def test_table_1_is_evaluated_without_overflow(sizes: list[int]) -> None:
    # Products of thousands of norms down to 1e-3 leave float64. Each of at most 2701 logarithms, of size <= 7, is
    # rounded by 1e-16, and so are partial sums of size <= 2e4: an error below 2701 * 2e4 * 1e-16 = 6e-9 in the worst
    # case, and with random signs below 1e-10.
    layers = [0.001 + torch.rand(size, 3, dtype=torch.float64) for size in sizes]
    got = table1(layers, samples=5000, width=64)
    with mpmath.workdps(60):
        want = [float(mpmath.log(value)) for value in directly(layers, 5000, 64)]
    assert [got.neyshabur2015, got.bartlett2017, got.neyshabur2018] == pytest.approx(want, abs=1e-9)
    assert (got.layers, got.samples, got.width) == (len(sizes), 5000, 64)


def test_bounds_of_a_model_count_every_layer_and_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    tied = nn.Sequential(model, model[3])  # one layer more
    optimizer = optimizer_of(model)
    conv = torch.cat([found.groups for found in weight_norms(optimizer)])
    linear = torch.tensor([by_numpy(model[3].weight.T)], dtype=torch.float64)
    got = generalization_bounds(model, optimizer, samples=100)
    assert astuple(got) == pytest.approx(astuple(table1([conv, linear], samples=100, width=8)), rel=CLOSE)
    got = generalization_bounds(tied, optimizer, samples=9, width=2)
    assert astuple(got) == pytest.approx(astuple(table1([conv, linear, linear], samples=9, width=2)), rel=CLOSE)


def test_bounds_fall_with_the_scale_as_the_product_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).double()
    optimizer = FGSGD(param_groups(model, "oblique"), lr=0.1, backend="reference")
    before = generalization_bounds(model, optimizer, samples=10)
    optimizer.rescale(model[0].weight, float(optimizer.plan.scale(0)) / 4)
    after = generalization_bounds(model, optimizer, samples=10)
    for name in ("neyshabur2015", "bartlett2017", "neyshabur2018"):
        assert getattr(before, name) - getattr(after, name) == pytest.approx(math.log(4), abs=1e-12)


def test_table_1_refuses() -> None:
    one = torch.ones(1, 3)
    with pytest.raises(ValueError, match="samples: wanted a whole number >= 1, got 0"):
        table1([one], samples=0, width=1)
    with pytest.raises(ValueError, match="width: wanted a whole number"):
        table1([one], samples=1, width=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: wanted the norms of one layer or more"):
        table1([], samples=1, width=1)
    optimizer = FGSGD([nn.Parameter(torch.ones(2))], lr=0.1, backend="reference")
    with pytest.raises(ValueError, match="model: wanted convolutions or linear layers, got none"):
        generalization_bounds(nn.ReLU(), optimizer, samples=1)
    linear = nn.Linear(2, 2)
    nn.init.zeros_(linear.weight)
    with pytest.raises(ValueError, match=r"in a group of layer '0'"):
        generalization_bounds(nn.Sequential(linear), optimizer, samples=1)


def test_euclidean_as_a_whole_has_no_components() -> None:
    optimizer = FGSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, manifold=Euclidean(), backend="reference")
    assert weight_norms(optimizer) == []

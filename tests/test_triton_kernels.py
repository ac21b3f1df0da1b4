"""Steps of the Triton kernels, interpreted, against the reference: ``cpu_lockstep`` derives the bounds.

The interpreter costs by the program and by the operation, not by the element, so that cases are chosen to meet every
rule, manifold, retraction, type, layout and way through the kernels once, and pairs of them as they come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cpu_lockstep import (
    ARRANGEMENTS,
    DTYPES,
    FG,
    MOMENTA,
    VECTOR_RULES,
    Case,
    arranged,
    check,
    check_gaps,
    name_of,
    on_manifold,
    one_group,
)
from stepping import group
from torch import Tensor
from triton_interpreted import launch, planning, step_

from manifold_kernels import views
from manifold_kernels.manifolds import BY_NAME, Euclidean
from manifold_kernels.triton import batched
from manifold_kernels.views import Layout

KERNEL, FILTER, MATRIX, FLAT = Layout("kernel"), Layout("filter"), Layout("matrix"), Layout("flat")
STEP_SIZES = ("none", "general")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as small as a machine's or smaller, so that groups take several programs."""
    monkeypatch.setattr(planning, "LANES", 16)
    monkeypatch.setattr(planning, "TILE", 512)
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("of", "retraction"), FG)
def test_small_matrices(of: str, retraction: str, dtype: torch.dtype) -> None:
    """Sizes that are unrolled and sizes that are not, wide and tall; steps from short to longer than the weight."""
    turn = itertools.cycle(itertools.product(MOMENTA, (0.2, 2.0), (False, True), STEP_SIZES, (1.0, "each")))
    for _ in range(3 * DTYPES.index(dtype) + FG.index((of, retraction))):
        next(turn)
    sizes = ((3, 3), (2, 4), (7, 7) if of != "stiefel" else (11, 3))
    for n, p in sizes[: 1 if (of, retraction) == ("stiefel", "exp") else 3]:  # it goes along in steps of its own
        options, length, individual, step_size, scale = next(turn)
        case = one_group(
            of,
            retraction,
            (3, 7, n, p),
            KERNEL,
            dtype=dtype,
            scale=scale,
            individual=individual,
            step_size=step_size,
            hyper={"lr": 0.5, **options},
            grad_size=2 * length / math.sqrt(n * p),
        )
        check(case, steps=2, step=step_)


def check_stiefel(size: tuple[int, int], retraction: str, dtype: torch.dtype, length: float) -> None:
    """A step of about ``length`` times the weight, and one more with its momentum."""
    case = one_group(
        "stiefel",
        retraction,
        (2, 2, *size),
        KERNEL,
        dtype=dtype,
        step_size="general" if length == 1 else "none",
        hyper={"lr": 0.5, "momentum": 0.9},
        grad_size=2 * length / math.sqrt(math.prod(size)),
    )
    check(case, steps=2 if max(size) < 10 else 1, step=step_)


@pytest.mark.parametrize("retraction", BY_NAME["stiefel"].retractions)
@pytest.mark.parametrize("size", [(5, 5), (4, 3), (8, 8), (17, 17), (33, 20), (130, 6)], ids=str)
def test_larger_stiefel_matrices(size: tuple[int, int], retraction: str) -> None:
    """Unrolled, in blocks, and by torch's linear algebra."""
    for dtype, length in zip(DTYPES, (0.1, 1.0, 3.0, 0.5), strict=True):
        if dtype != torch.float16 or max(size) >= 130:
            # The exponential goes along a long way in steps of its own.
            check_stiefel(size, retraction, dtype, min(length, 1.0) if retraction == "exp" else length)


#: From 2 x 2 to 8 x 8, square, tall and wide.
SMALL = [(n, p) for n in range(2, 9) for p in range(2, 9)]


@pytest.mark.long
@pytest.mark.parametrize("size", [*SMALL, (16, 16), (31, 32), (64, 64), (9, 128), (128, 128), (140, 130)], ids=str)
def test_stiefel_matrices_of_every_size(size: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        for retraction, length in (("qr", 0.3), ("qr", 3.0), ("polar", 1.0), ("cayley", 0.5)):
            if retraction != "cayley" or max(size) <= 32:
                check_stiefel(size, retraction, dtype, length)


def test_products_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As machines take them of all matrices but 16 x 16, and a whole block of steps, short and long."""
    monkeypatch.setattr(batched, "SMALLEST", batched.tl.constexpr(1000))
    for size, retraction, length in (((7, 6), "qr", 0.3), ((6, 3), "polar", 1.0), ((5, 8), "cayley", 0.5)):
        check_stiefel(size, retraction, torch.float32, length)
    case = one_group("stiefel", "qr", (3, 7, 6, 6), KERNEL, scale="each", individual=True, grad_size=0.1)
    case.gradient = spread_over_sizes(case.gradient)
    check(case, steps=1, step=step_)


def spread_over_sizes(gradient: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Tensor]:
    """Gradients of neighbours from a thousandth to a thousand times as large."""

    def spread(generator: torch.Generator) -> Tensor:
        drawn = gradient(generator)
        return drawn * torch.logspace(-3, 3, drawn.shape[1])[:, None, None]

    return spread


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("of", "option"), [*(kind for kind in FG if kind[0] != "oblique"), *VECTOR_RULES])
def test_filters(of: str, option: str, dtype: torch.dtype) -> None:
    """Vectors shorter than a block, of a block, and longer; a single column on Stiefel is a sphere."""
    turn = itertools.cycle(itertools.product((False, True), STEP_SIZES, (0.3, 3.0)))
    options = itertools.cycle(o for o in MOMENTA if of != "grassmann" or "nesterov" not in o)
    for length in (7, 64, 257):
        individual, step_size, size = next(turn)
        hyper = {"lr": 0.3, **next(options)}
        if option == "adam_g":
            hyper["momentum"] = 0.9
        fg = (of, option) in FG
        case = one_group(
            of,
            option,
            (5, length),
            FILTER,
            dtype=dtype,
            individual=individual and fg,
            step_size=step_size if fg else "none",
            hyper=hyper,
            grad_size=size / length if of == "scale_invariant" else size / math.sqrt(length),
        )
        check(case, steps=2, step=step_)


@pytest.mark.parametrize("of", ["sphere", "oblique", "stiefel", "scale_invariant", "grassmann", "euclidean"])
def test_groups_of_several_programs(of: str, small_blocks: None) -> None:
    """Norms summed over programs, vectors longer than a block, columns of a matrix in several pieces, and tails."""
    options = {"lr": 0.3, "momentum": 0.9}
    cases = {
        "sphere": [((5, 7, 3, 3), KERNEL), ((3, 700), FILTER), ((30, 40), MATRIX)],
        "oblique": [((5, 7, 3, 3), KERNEL), ((2, 3, 40, 10), KERNEL), ((40, 30), MATRIX)],
        "stiefel": [((5, 7, 3, 3), KERNEL), ((2, 3, 9, 9), KERNEL)],
        "scale_invariant": [((5, 7), FILTER), ((3, 700), FILTER), ((3, 300), FILTER)],
        "grassmann": [((5, 7), FILTER), ((3, 700), FILTER), ((3, 300), FILTER)],
        "euclidean": [((5, 7, 3, 3), KERNEL), ((5, 7, 3, 3), FLAT), ((3, 5, 16, 9), KERNEL)],
    }
    rules = [option for manifold, option in VECTOR_RULES if manifold == of] or [BY_NAME[of].retractions[0]]
    dtypes = itertools.cycle((torch.float32, torch.float64))
    sizes = itertools.cycle(("none", "general") if BY_NAME[of].code <= BY_NAME["stiefel"].code else ("none",))
    for (shape, layout), option, dtype in zip(cases[of] * len(rules), rules * len(cases[of]), dtypes, strict=False):
        size = 0.3 / (math.prod(shape[1:]) if of == "scale_invariant" else 1)
        case = one_group(of, option, shape, layout, dtype=dtype, step_size=next(sizes), hyper=options, grad_size=size)
        check(case, steps=2, step=step_)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("weights", ARRANGEMENTS)
def test_arrangements_in_memory(weights: str, shift: int) -> None:
    """Strides of the weight against those of its gradient; 32 inputs are whole 16-byte loads in every type."""
    turn = itertools.cycle(itertools.product(DTYPES, (MOMENTA[1], MOMENTA[2], MOMENTA[0])))
    cases = [
        ("sphere", "projection", KERNEL),
        ("stiefel", "qr", KERNEL),
        ("oblique", "exp", MATRIX),
        ("scale_invariant", "psi_sgd", FILTER),
        ("sphere", "projection", Layout("filter", out_dim=1, channel_groups=2)),
        ("euclidean", "add", FLAT),
    ]
    others = [*ARRANGEMENTS, "expanded"]
    grads = others[(ARRANGEMENTS.index(weights) + shift) % len(others)]
    for _ in range(ARRANGEMENTS.index(weights)):
        next(turn)
    for of, option, layout in cases[:: 1 if shift == 0 else 2]:
        dtype, options = next(turn)
        case = one_group(
            of,
            option,
            (4, 32, 3, 3),
            layout,
            dtype=dtype,
            arrangement=weights,
            grad_arrangement=grads,
            hyper={"lr": 0.1, **options},
            grad_size=0.2 if of != "scale_invariant" else 0.002,
        )
        check(case, steps=1, step=step_)


VIEWS = [
    ((5, 4, 7), FILTER),
    ((5, 4, 2, 3, 3), FILTER),
    ((5, 4, 1, 3, 3), KERNEL),
    ((5, 4, 2, 3, 3), MATRIX),
    ((6, 4, 3, 3), Layout("filter", rows=3)),
    ((6, 4, 3, 5), Layout("kernel", out_dim=1, channel_groups=3)),
    ((6, 4, 3, 3), Layout("filter", out_dim=1, channel_groups=2, rows=2)),
    ((6, 4, 3, 3), Layout("matrix", out_dim=1, channel_groups=3)),
    ((6, 4, 2, 2, 2), Layout("matrix", out_dim=1, channel_groups=2)),
]


@pytest.mark.parametrize(("shape", "layout"), VIEWS, ids=str)
def test_views(shape: tuple[int, ...], layout: Layout) -> None:
    """Convolutions of one, two and three dimensions, transposed and grouped, and rows that belong together."""
    kinds = [("sphere", "projection"), ("stiefel", "qr"), ("oblique", "projection")]
    if layout.view == "filter":
        kinds = [("sphere", "exp"), ("scale_invariant", "psi_sgd"), ("grassmann", "adam_g")]
    for (of, option), arrangement in zip(kinds, ARRANGEMENTS, strict=False):
        case = one_group(
            of,
            option,
            shape,
            layout,
            scale=1.0 if of in ("grassmann", "scale_invariant") else "each",
            arrangement=arrangement,
            step_size="general" if (of, option) in FG else "none",
            hyper={"lr": 0.2, "momentum": 0.9},
            grad_size=0.3 if of != "scale_invariant" else 0.01,
        )
        check(case, steps=2, step=step_)


@pytest.mark.parametrize(
    ("arrangement", "dtype"), list(zip(("channels_last", "contiguous") * 2, DTYPES, strict=True)), ids=name_of
)
def test_several_manifolds_in_one_tensor(arrangement: str, dtype: torch.dtype) -> None:
    """Components dealt at random, a scale for each; groups that share a norm beside groups that do not."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((20, 12, 3, 3), generator=generator, dtype=torch.float64)
    batch = views.matrices(weight, KERNEL).clone()
    scales = torch.rand(240, generator=generator, dtype=torch.float64) + 0.5
    kinds = [("euclidean", "add"), *FG]
    groups = []
    for index, part in enumerate(torch.randperm(240, generator=generator).tensor_split(len(kinds))):
        of, option = kinds[index]
        own = batch[part][:, None].clone()
        batch[part] = on_manifold(BY_NAME[of](), own, KERNEL, scales[part])[:, 0]
        groups.append(
            group(
                of,
                "kernel",
                retraction=option,
                components=part,
                scale=scales[part],
                individual=index % 2 == 0,
                step_size=STEP_SIZES[index // 2 % 2],
            )
        )
    views.write_matrices(weight, KERNEL, batch)
    hyper = {"lr": 0.2, "momentum": 0.9, "nesterov": 1}
    case = Case(arranged(weight.to(dtype), arrangement), groups, hyper, grad_size=0.5, grad_arrangement=arrangement)
    check(case, steps=1, step=step_)


@pytest.mark.parametrize(
    ("of", "option", "shape", "layout"),
    [
        ("sphere", "exp", (9, 300), FILTER),
        ("oblique", "projection", (3, 3, 40, 10), KERNEL),
        ("stiefel", "qr", (3, 3, 12, 11), KERNEL),
        ("stiefel", "polar", (3, 3, 130, 6), KERNEL),
        ("scale_invariant", "psi_sgd", (9, 300), FILTER),
        ("grassmann", "sgd_g", (9, 300), FILTER),
        ("grassmann", "adam_g", (9, 300), FILTER),
    ],
)
def test_listed_components_of_larger_kernels(of: str, option: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Components dealt at random to a group of one, groups with a norm for each, and one for all."""
    fg, small = (of, option) in FG, 0.001 if of == "scale_invariant" else 0.03
    dtype = torch.bfloat16 if layout == FILTER else torch.float32
    case = one_group(of, option, shape, layout, dtype=dtype, hyper={"lr": 0.2, "momentum": 0.9}, grad_size=small)
    parts = torch.randperm(9, generator=torch.Generator().manual_seed(1)).split((1, 3, 5))
    how = {"retraction": option, "step_size": "general"} if fg else {"rule": option}
    case.groups = [
        group(of, layout, components=part, individual=fg and index == 1, **how) for index, part in enumerate(parts)
    ]
    check(case, steps=1, step=step_)


@pytest.mark.parametrize("count", [1, 8, 15, 17])
def test_counts(count: int, small_blocks: None) -> None:
    """One less than a block, as many and one more: 16 matrices, 8 vectors, 16 rows."""
    for of, option, shape, layout in (
        ("sphere", "projection", (count, 1, 3, 3), KERNEL),
        ("stiefel", "qr", (count, 1, 6, 5), KERNEL),
        ("sphere", "exp", (count, 33), FILTER),
        ("scale_invariant", "psi_sgd", (count, 20), FILTER),
        ("euclidean", "add", (count, 48), FLAT),
    ):
        how = {"step_size": "general"} if (of, option) in FG else {}
        case = one_group(of, option, shape, layout, hyper={"lr": 0.1, "momentum": 0.9}, grad_size=0.01, **how)
        check(case, steps=1, step=step_)


@pytest.mark.parametrize("arrangement", ["gaps", "strided"])
def test_what_lies_between_is_not_written(arrangement: str) -> None:
    check_gaps(arrangement, step_)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", [*MOMENTA, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.1}], ids=str)
def test_euclidean_groups_to_the_bit(options: dict[str, float], dtype: torch.dtype) -> None:
    """Flat tensors of any strides and lengths, and listed kernels; with a bound on the step size to rounding."""
    for shape, arrangement, grads in [
        ((1,), "contiguous", "contiguous"),
        ((37,), "misaligned", "strided"),
        ((5, 7, 3, 3), "gaps", "channels_last"),
    ]:
        weight = arranged(torch.randn(shape, dtype=torch.float64).to(dtype), arrangement)
        check(Case(weight, [group(Euclidean())], options, grad_arrangement=grads), steps=2, step=step_)
    order = torch.randperm(35)
    rows = [
        group(Euclidean(), "kernel", components=part, step_size=size, individual=individual)
        for part, size, individual in zip(order.split((4, 17, 14)), ("none", "general", "none"), (0, 1, 1), strict=True)
    ]
    check(Case(torch.randn(5, 7, 3, 3).to(dtype), rows, options), steps=2, step=step_)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("guard", [1.5, 1e4])
def test_psi_decay_and_guard(guard: float, dtype: torch.dtype) -> None:
    """Half of the rows are long enough to meet the guard of 1.5, and the decay bounded by a half."""
    for momentum, decay in (({}, 0.05), ({"momentum": 0.9}, 10.0), ({"momentum": 0.9}, 0.0)):
        hyper = {"lr": 0.2, "guard": guard, "weight_decay": decay, **momentum}
        case = one_group("scale_invariant", "psi_sgd", (8, 100), FILTER, dtype=dtype, hyper=hyper)
        rows = torch.linspace(0.3, 3.0, 8).to(dtype)[:, None]
        case.weight /= case.weight.float().norm(dim=1, keepdim=True).to(dtype)
        case.weight *= rows
        case.grad_size = 1 / 100
        check(case, steps=2, step=step_)


@pytest.mark.parametrize(("rho", "curvature"), [(0.3, 0.0), (2.0, 50.0)])
def test_step_sizes(rho: float, curvature: float) -> None:
    """[FG] Eq. 5 from gradients that it does not touch to gradients that it shortens a thousand times."""
    for size, individual in ((1e-3, True), (1.0, False), (1e3, True), (1e3, False)):
        for of, option in (("sphere", "projection"), ("oblique", "exp"), ("stiefel", "qr")):
            hyper = {"lr": 1.0, "rho": rho, "curvature": curvature}
            case = one_group(
                of,
                option,
                (3, 6, 3, 3),
                KERNEL,
                individual=individual,
                step_size="general",
                hyper=hyper,
                grad_size=size,
            )
            check(case, steps=1, step=step_)

"""Steps of the compiled CPU kernels against the reference: every manifold, retraction, type, size, view and layout.

``cpu_lockstep`` derives the bounds. Tests take a case through all values of one axis while the others go round, so that
pairs of values meet; the last one draws from everything at once.
"""

from __future__ import annotations

import itertools
import math

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
    compiled,
    name_of,
    on_manifold,
    one_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import group, run_steps

from manifold_kernels import ops, views
from manifold_kernels.manifolds import BY_NAME, Euclidean
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL, FILTER, MATRIX = Layout("kernel"), Layout("filter"), Layout("matrix")
#: Sizes with kernels of their own, others, one more than a register of columns, and those too large for a lane.
SIZES = [(2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (2, 3), (3, 5), (5, 3), (8, 8), (11, 3), (16, 16), (17, 17), (40, 24)]
#: Too large for a lane: full registers and tiles, one more and one less, tall, wide, a row over; the last two are
#: shared by threads.
LARGER = [(17, 17), (64, 32), (33, 20), (128, 128), (100, 7), (20, 33), (7, 100), (300, 2), (31, 15), (65, 48)]
SHARED = [(210, 190), (33, 1000)]
STEP_SIZES = ("none", "general")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("of", "retraction"), FG)
def test_sizes(of: str, retraction: str, dtype: torch.dtype) -> None:
    """21 kernels: a register and a part of one, whatever its width. Steps from short to longer than the weight."""
    options = itertools.cycle(MOMENTA)
    turn = itertools.cycle(itertools.product((0.2, 2.0), (False, True), STEP_SIZES, (1.0, "each")))
    for n, p in SIZES:
        length, individual, step_size, scale = next(turn)
        case = one_group(
            of,
            retraction,
            (3, 7, n, p),
            KERNEL,
            dtype=dtype,
            scale=scale,
            individual=individual,
            step_size=step_size,
            hyper={"lr": 0.5, **next(options)},
            grad_size=2 * length / math.sqrt(n * p),
        )
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [*LARGER, *SHARED], ids=str)
def test_larger_stiefel_matrices(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Products and a Cholesky factor once, twice where the step is longer than 3, and reflections beyond 90."""
    options = itertools.cycle(MOMENTA)
    turn = itertools.cycle(itertools.product((False, True), STEP_SIZES, (1.0, "each")))
    lengths = (0.2, 2.0, 20.0, 200.0) if math.prod(size) < 5000 else (0.2, 20.0)
    for arrangement, grads in zip(ARRANGEMENTS, ARRANGEMENTS[1:] + ARRANGEMENTS[:1], strict=True):
        individual, step_size, scale = next(turn)
        length = lengths[ARRANGEMENTS.index(arrangement) % len(lengths)]
        case = one_group(
            "stiefel",
            "qr",
            (1, 3, *size),
            KERNEL,
            dtype=dtype,
            scale=scale,
            arrangement=arrangement,
            grad_arrangement=grads,
            individual=individual,
            step_size=step_size,
            hyper={"lr": 0.5, **next(options)},
            grad_size=2 * length / math.sqrt(math.prod(size)),
        )
        check(case, steps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [*LARGER, (400, 17)], ids=str)
def test_larger_oblique_matrices(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Columns in lanes, with every remainder of a register, where rows lie one after the other; else one by one."""
    options = itertools.cycle(MOMENTA)
    turn = itertools.cycle(itertools.product((False, True), STEP_SIZES, (1.0, "each")))
    retractions = itertools.cycle(BY_NAME["oblique"].retractions)
    for arrangement, grads in zip(ARRANGEMENTS, ARRANGEMENTS[1:] + ARRANGEMENTS[:1], strict=True):
        individual, step_size, scale = next(turn)
        case = one_group(
            "oblique",
            next(retractions),
            (1, 3, *size),
            KERNEL,
            dtype=dtype,
            scale=scale,
            arrangement=arrangement,
            grad_arrangement=grads,
            individual=individual,
            step_size=step_size,
            hyper={"lr": 0.5, **next(options)},
            grad_size=1 / math.sqrt(size[0]),
        )
        check(case, steps=2)


class OddColumns(Case):
    """Gradients of which one column is zero, one stands on its sphere and one is beyond closed forms in float."""

    def gradient(self, generator: torch.Generator) -> torch.Tensor:
        grad = super().gradient(generator)
        grad[..., 0] = 0
        grad[..., 1] = 2 * self.weight[..., 1]
        grad[..., 2] *= 1e3 if grad.dtype == torch.float16 else 1e17
        return grad


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("retraction", BY_NAME["oblique"].retractions)
@pytest.mark.parametrize("options", MOMENTA, ids=str)
def test_odd_columns_beside_others(options: dict[str, float], retraction: str, dtype: torch.dtype) -> None:
    for step_size in STEP_SIZES:
        hyper = {"lr": 0.5, **options}
        case = one_group("oblique", retraction, (1, 2, 64, 20), KERNEL, dtype=dtype, step_size=step_size, hyper=hyper)
        check(OddColumns(**vars(case)), steps=2)


@pytest.mark.parametrize("length", [1e-3, 1.0, 2.9, 3.1, 30.0, 85.0, 100.0, 1e4])
@pytest.mark.parametrize("size", [(17, 17), (64, 32), (33, 20), (128, 128), (100, 7), (210, 190)], ids=str)
def test_larger_matrices_are_judged_as_lapack_judges(size: tuple[int, int], length: float) -> None:
    """``||I - Q^T Q||_1 / (n eps)`` and ``||Y - Q R||_1 / (||Y||_1 n eps)`` below 5, R upper with a diagonal >= 0, for
    steps on either side of where the ways part (3 and 90 s): in all directions, and in one, of the worst condition."""
    eps = torch.finfo(torch.float32).eps
    w = on_manifold(BY_NAME["stiefel"](), torch.randn(1, 2, *size, dtype=torch.float64), KERNEL, torch.ones(2)).float()
    q, g = w.double(), torch.randn(w.shape, dtype=torch.float64)
    g[:, 1] = g[:, 1, :, :1] * g[:, 1, :1]
    a = q.mT @ g
    xi = g - q @ (a + a.mT) / 2
    xi *= length / xi.flatten(2).norm(dim=2)[..., None, None]
    grad = xi.float()
    run = run_steps(compiled, [w], [[grad]], [group("stiefel", individual=True)], [{"lr": 1.0}])
    # What is stepped along is projected once more: from the rounded gradient.
    a = q.mT @ grad.double()
    y = q - (grad.double() - q @ (a + a.mT) / 2)
    got = run.params[0].double()
    r = torch.linalg.solve(got.mT @ got, got.mT @ y).triu()
    assert bool((r.diagonal(dim1=-2, dim2=-1) >= 0).all())
    one = torch.eye(size[1], dtype=torch.float64)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.abs().sum(-2).amax(-1)

    assert bool((norm(one - got.mT @ got) < 5 * size[0] * eps).all())
    assert bool((norm(y - got @ r) < 5 * size[0] * eps * norm(y)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("of", "retraction"), [*FG, *VECTOR_RULES])
def test_filters(of: str, retraction: str, dtype: torch.dtype) -> None:
    """Vectors below, at and above the length that a lane takes, and with every remainder of a register."""
    turn = itertools.cycle(itertools.product((False, True), STEP_SIZES, (0.3, 3.0)))
    options = itertools.cycle(o for o in MOMENTA if of != "grassmann" or "nesterov" not in o)
    for length in (2, 7, 9, 17, 49, 63, 64, 65, 100, 256, 257, 576, 4608):
        if of == "oblique" or (of == "stiefel" and length > 256):
            length = min(length, 100)  # a single column is a sphere
        individual, step_size, size = next(turn)
        hyper = {"lr": 0.3, **next(options)}
        if retraction == "adam_g":
            hyper["momentum"] = 0.9
        case = one_group(
            of,
            retraction,
            (5, length),
            FILTER,
            dtype=dtype,
            individual=individual and of in ("sphere", "stiefel"),
            step_size=step_size if of in ("sphere", "stiefel") else "none",
            hyper=hyper,
            grad_size=size / length if of == "scale_invariant" else size / math.sqrt(length),
        )
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (6, 4, 3, 3), (40, 300), (1, 9), (9, 1), (260, 2)], ids=str)
@pytest.mark.parametrize("of", ["sphere", "oblique", "stiefel"])
def test_matrix_views(of: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Linear layers and orthogonal convolutions; columns short (a lane each) and long (a register's worth)."""
    layout = MATRIX
    if of == "oblique" and views.shape_of(torch.empty(shape), layout).n == 1:
        return
    for index, retraction in enumerate(BY_NAME[of].retractions):
        options = {"lr": 0.5, **MOMENTA[(index + len(shape)) % len(MOMENTA)]}
        size = 1 / math.sqrt(math.prod(shape))
        case = one_group(of, retraction, shape, layout, dtype=dtype, hyper=options, grad_size=size, step_size="general")
        check(case)


@pytest.mark.parametrize("of", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("count", [1, 8, 15, 16, 17, 31, 33, 64, 1000])
def test_counts(count: int, of: str) -> None:
    """Registers that are full, nearly full and hold one matrix, of the sizes in registers and of any size."""
    turn = itertools.cycle(itertools.product(MOMENTA, (False, True), STEP_SIZES))
    for n, p in ((3, 3), (2, 3), (4, 4)):
        for dtype, shape in zip(DTYPES, ((1, count), (count, 1)) * 2, strict=True):
            options, individual, step_size = next(turn)
            case = one_group(
                of,
                BY_NAME[of].retractions[0],
                (*shape, n, p),
                KERNEL,
                dtype=dtype,
                individual=individual,
                step_size=step_size,
                hyper={"lr": 0.5, **options},
            )
            check(case, steps=2)


@pytest.mark.parametrize("grads", [*ARRANGEMENTS, "expanded"])
@pytest.mark.parametrize("weights", ARRANGEMENTS)
def test_arrangements_in_memory(weights: str, grads: str) -> None:
    """Strides of the weight against strides of its gradient; 18 inputs are a register of lanes and more."""
    turn = itertools.cycle(itertools.product(DTYPES, (MOMENTA[1], MOMENTA[2], MOMENTA[0])))
    cases = [
        ("sphere", "projection", KERNEL),
        ("stiefel", "qr", KERNEL),
        ("stiefel", "polar", MATRIX),
        ("oblique", "projection", KERNEL),
        ("oblique", "exp", MATRIX),
        ("sphere", "exp", FILTER),
        ("scale_invariant", "psi_sgd", FILTER),
        ("grassmann", "sgd_g", Layout("filter", rows=2)),
        ("sphere", "projection", Layout("filter", out_dim=1, channel_groups=2)),
        ("stiefel", "cayley", Layout("matrix", out_dim=1)),
        ("stiefel", "qr", MATRIX),
        ("stiefel", "qr", Layout("matrix", out_dim=1)),
    ]
    for of, option, layout in cases:
        dtype, options = next(turn)
        if of == "grassmann":
            options = {key: value for key, value in options.items() if key != "nesterov"}
        case = one_group(
            of,
            option,
            (4, 18, 3, 3),
            layout,
            dtype=dtype,
            arrangement=weights,
            grad_arrangement=grads,
            hyper={"lr": 0.1, **options},
            grad_size=0.2,
        )
        check(case, steps=2)


VIEWS = [
    ((5, 4, 7), FILTER),
    ((5, 4, 7), MATRIX),
    ((5, 4, 2, 3, 3), FILTER),
    ((5, 4, 1, 3, 3), KERNEL),
    ((5, 4, 3, 1, 2), KERNEL),
    ((5, 4, 2, 3, 3), MATRIX),
    ((6, 4, 3, 3), Layout("filter", rows=3)),
    ((6, 4, 3, 3), Layout("filter", rows=6)),
    ((6, 4, 3, 3), Layout("kernel", out_dim=1)),
    ((6, 4, 3, 5), Layout("kernel", out_dim=1, channel_groups=3)),
    ((6, 4, 3, 3), Layout("filter", out_dim=1, channel_groups=2)),
    ((6, 4, 3, 3), Layout("filter", out_dim=1, channel_groups=2, rows=2)),
    ((6, 4, 3, 3), Layout("matrix", out_dim=1, channel_groups=3)),
    ((6, 4, 5), Layout("filter", out_dim=1)),
    ((6, 4, 5), Layout("matrix", out_dim=1, channel_groups=2)),
    ((6, 4, 2, 2, 2), Layout("matrix", out_dim=1, channel_groups=2)),
    ((6, 4), Layout("matrix", out_dim=1)),
]


@pytest.mark.parametrize(("shape", "layout"), VIEWS, ids=str)
def test_views(shape: tuple[int, ...], layout: Layout) -> None:
    """Convolutions of one, two and three dimensions, transposed and grouped, and rows that belong together."""
    kinds = [*FG, *VECTOR_RULES] if layout.view == "filter" else FG
    turn = itertools.cycle(itertools.product(ARRANGEMENTS[:3], DTYPES[:3], STEP_SIZES))
    for of, option in kinds:
        if of == "oblique" and layout.view == "filter":
            continue
        arrangement, dtype, step_size = next(turn)
        case = one_group(
            of,
            option,
            shape,
            layout,
            dtype=dtype,
            scale=1.0 if of in ("grassmann", "scale_invariant") else "each",
            arrangement=arrangement,
            step_size=step_size if (of, option) in FG else "none",
            hyper={"lr": 0.2, "momentum": 0.9},
            grad_size=0.3,
        )
        check(case, steps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "gaps"])
def test_several_manifolds_in_one_tensor(arrangement: str, dtype: torch.dtype) -> None:
    """Components dealt at random, a scale for each; groups that share a norm beside groups that do not."""
    generator = torch.Generator().manual_seed(3)
    shape = (20, 12, 3, 3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
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
    check(Case(arranged(weight.to(dtype), arrangement), groups, hyper, grad_size=0.5, grad_arrangement=arrangement))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", [*MOMENTA, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.1}], ids=str)
def test_euclidean_groups_to_the_bit(options: dict[str, float], dtype: torch.dtype) -> None:
    """Flat tensors of any strides and lengths, and listed kernels."""
    for shape, arrangement, grads in [
        ((1,), "contiguous", "contiguous"),
        ((37,), "misaligned", "strided"),
        ((5, 7, 3, 3), "channels_last", "contiguous"),
        ((5, 7, 3, 3), "channels_last", "channels_last"),
        ((5, 7, 3, 3), "gaps", "transposed"),
        ((5, 7, 3, 3), "contiguous", "expanded"),
        ((200, 100), "contiguous", "contiguous"),
    ]:
        weight = arranged(torch.randn(shape, dtype=torch.float64).to(dtype), arrangement)
        check(Case(weight, [group(Euclidean())], options, grad_arrangement=grads))
    order = torch.randperm(35)
    rows = [group(Euclidean(), "kernel", components=part) for part in (order[:4], order[4:21], order[21:])]
    check(Case(torch.randn(5, 7, 3, 3).to(dtype), rows, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("guard", [1.5, 1e4])
@pytest.mark.parametrize("decay", [0.0, 0.05, 10.0])
def test_psi_decay_and_guard(decay: float, guard: float, dtype: torch.dtype) -> None:
    """Half of the rows are long enough to meet the guard of 1.5, and the decay bounded by a half."""
    for momentum in ({}, {"momentum": 0.9}):
        for length in (9, 100):
            hyper = {"lr": 0.2, "guard": guard, "weight_decay": decay, **momentum}
            case = one_group("scale_invariant", "psi_sgd", (8, length), FILTER, dtype=dtype, hyper=hyper)
            rows = torch.linspace(0.3, 3.0, 8).to(dtype)[:, None]
            case.weight /= case.weight.float().norm(dim=1, keepdim=True).to(dtype)
            case.weight *= rows
            case.grad_size = 1 / length
            check(case)


@pytest.mark.parametrize("rho", [0.3, 2.0])
@pytest.mark.parametrize("curvature", [0.0, 50.0])
def test_step_sizes(curvature: float, rho: float) -> None:
    """[FG] Eq. 5 from gradients that it does not touch to gradients that it shortens a thousand times."""
    for of, retraction in FG:
        for size, individual in ((1e-3, True), (1.0, False), (1.0, True), (1e3, False)):
            for dtype in (torch.float32, torch.float64):
                case = one_group(
                    of,
                    retraction,
                    (3, 6, 3, 3),
                    KERNEL,
                    dtype=dtype,
                    individual=individual,
                    step_size="general",
                    hyper={"lr": 1.0, "rho": rho, "curvature": curvature},
                    grad_size=size,
                )
                check(case, steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    ("of", "layout", "shape"),
    [
        ("sphere", KERNEL, (64, 64, 3, 3)),
        ("oblique", KERNEL, (64, 64, 3, 3)),
        ("stiefel", KERNEL, (64, 64, 3, 3)),
        ("stiefel", KERNEL, (64, 150, 2, 2)),
        ("stiefel", KERNEL, (5, 9, 33, 20)),
        ("sphere", FILTER, (40, 1001)),
        ("oblique", MATRIX, (130, 300)),
    ],
)
def test_groups_beyond_a_cache_take_two_passes(
    of: str, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for options in MOMENTA[:3]:
        for arrangement in ("contiguous", "channels_last"):
            case = one_group(
                of,
                BY_NAME[of].retractions[0],
                shape,
                layout,
                dtype=dtype,
                arrangement=arrangement,
                step_size="general",
                hyper={"lr": 1.0, **options},
                grad_size=0.03,
            )
            check(case, steps=2)


@pytest.mark.parametrize("arrangement", ["gaps", "strided"])
def test_what_lies_between_is_not_written(arrangement: str) -> None:
    check_gaps(arrangement)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Anything that a plan with one group, or two of listed components, can say."""
    layout = draw(st.sampled_from([KERNEL, FILTER, MATRIX, Layout("filter", rows=2)]))
    if layout.rows == 1 and draw(st.booleans()):
        layout = Layout(layout.view, out_dim=1, channel_groups=draw(st.sampled_from([1, 2])))
    kinds = [*FG, *VECTOR_RULES] if layout.view == "filter" else FG
    of, option = draw(st.sampled_from([kind for kind in kinds if layout.view != "filter" or kind[0] != "oblique"]))
    outs, ins = draw(st.integers(1, 6)) * 2, draw(st.integers(1, 12)) * 2
    kernel = draw(st.lists(st.integers(2 if layout.view == "kernel" else 1, 6), min_size=2, max_size=2))
    dtype = draw(st.sampled_from(DTYPES))
    fg = (of, option) in FG
    options = draw(st.sampled_from([o for o in MOMENTA if fg or "nesterov" not in o]))
    hyper = {"lr": draw(st.sampled_from([1e-3, 0.1, 1.0])), **options}
    if option == "adam_g":
        hyper["momentum"] = 0.9
    shape = (outs, ins, *kernel)
    elements = views.shape_of(torch.empty(shape), layout)
    if fg:
        hyper |= {"rho": draw(st.sampled_from([0.5, 1.0])), "curvature": draw(st.sampled_from([0.0, 2.0]))}
    stretch = draw(st.sampled_from([1e-3, 0.1, 1.0])) / (elements.n * elements.p) ** (0.5 if fg else 1.0)
    case = one_group(
        of,
        option,
        shape,
        layout,
        dtype=dtype,
        scale=draw(st.sampled_from([0.125, 1.0, 3.0, "each"])) if fg else 1.0,
        arrangement=draw(st.sampled_from(ARRANGEMENTS)),
        seed=draw(st.integers(0, 10**6)),
        individual=fg and draw(st.booleans()),
        step_size=draw(st.sampled_from(STEP_SIZES)) if fg else "none",
        hyper=hyper,
        grad_size=stretch / (hyper["lr"] if fg else 1.0),
        grad_arrangement=draw(st.sampled_from([*ARRANGEMENTS, "expanded"])),
    )
    if elements.count > 1 and draw(st.booleans()):
        order = torch.randperm(elements.count, generator=torch.Generator().manual_seed(case.seed))
        cut = draw(st.integers(1, elements.count))
        whole = case.groups[0]
        scales = torch.as_tensor(whole.scale, dtype=torch.float64).expand(elements.count)
        parts = [part for part in (order[:cut], order[cut:]) if len(part)]
        case.groups = [
            group(
                of,
                layout,
                rule=option if not fg else None,
                retraction=option if fg else None,
                scale=scales[part],
                individual=whole.individual,
                step_size=whole.step_size,
                components=part,
            )
            for part in parts
        ]
    return case


@settings(max_examples=250)
@given(cases())
def test_anything(case: Case) -> None:
    check(case, steps=4)

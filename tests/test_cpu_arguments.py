"""The compiled operator's arguments: wrong ones are refused, missing ones not read, and numbers mean the same to both
sides of a call."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cpu_engines import ENGINES, FILTER, KERNEL, row, weight_of
from cpu_lockstep import clone, compiled
from stepping import group, hyper_table, place_, run_steps, start
from torch import Tensor

from manifold_kernels import manifolds, ops, plan, views
from manifold_kernels.manifolds import Grassmann, Oblique, Sphere, Stiefel
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, Plan

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def arguments() -> list[object]:
    """A valid call: a sphere and an Adam-G weight."""
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL), place_(Grassmann(), torch.randn(4, 9), FILTER)]
    rows = [group(Sphere(), parameter=0), group(Grassmann(), parameter=1, rule="adam_g")]
    hyper = [{"momentum": 0.9}]
    run, of = start(w, rows, hyper), Plan.build(rows, w)
    grads: list[Tensor | None] = [torch.randn_like(p) for p in w]
    return [
        run.params,
        grads,
        run.momenta,
        run.variances,
        run.steps,
        run.nonfinite,
        of.groups,
        of.components,
        of.scales,
        hyper_table(hyper),
    ]


PARAMS, GRADS, MOMENTA, VARIANCES, STEPS, NONFINITE, GROUPS, COMPONENTS, SCALES, HYPER = range(10)


def put(position: int, value: object) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[position] = value

    return change


def put_in(position: int, index: int, value: Callable[[Tensor], Tensor]) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[position][index] = value(args[position][index])  # type: ignore[index]

    return change


def put_column(name: str, value: int, index: int = 0) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[GROUPS][index, GROUP_COLUMNS.index(name)] = value  # type: ignore[index]

    return change


WRONG: list[tuple[str, str, Callable[[list[object]], None]]] = [
    ("fewer gradients", "grads, momenta, variances", lambda args: args[GRADS].pop()),  # type: ignore[attr-defined]
    ("fewer momenta", "grads, momenta, variances", lambda args: args[MOMENTA].pop()),  # type: ignore[attr-defined]
    ("fewer variances", "grads, momenta, variances", lambda args: args[VARIANCES].pop()),  # type: ignore[attr-defined]
    ("integer weight", "params", put_in(PARAMS, 1, lambda t: t.int())),
    ("gradient's shape", r"grads\[1\]", put_in(GRADS, 1, lambda t: t[:2])),
    ("gradient's dtype", r"grads\[1\]", put_in(GRADS, 1, lambda t: t.double())),
    ("momentum's shape", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t[:2])),
    ("momentum's strides", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.T.contiguous().T)),
    ("momentum's dtype", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.double())),
    ("no momentum", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.new_empty(0))),
    ("no momentum where asked for", r"momenta\[0\]", put_in(MOMENTA, 0, lambda t: t.new_empty(0))),
    ("variances' number", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: t[:3])),
    ("variances' dtype", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: t.double())),
    ("variances' strides", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: torch.zeros(8)[::2])),
    ("steps' number", "steps", put(STEPS, torch.zeros(3, dtype=torch.int64))),
    ("steps' dtype", "steps", put(STEPS, torch.zeros(2))),
    ("nonfinite's number", "nonfinite", put(NONFINITE, torch.zeros(1, dtype=torch.int64))),
    ("nonfinite's dtype", "nonfinite", put(NONFINITE, torch.zeros(2, dtype=torch.int32))),
    ("groups' columns", "groups", put(GROUPS, torch.zeros(2, len(GROUP_COLUMNS) - 1, dtype=torch.int64))),
    ("groups' dimensions", "groups", put(GROUPS, torch.zeros(len(GROUP_COLUMNS), dtype=torch.int64))),
    ("groups' dtype", "groups", put(GROUPS, torch.zeros(2, len(GROUP_COLUMNS)))),
    ("groups' strides", "groups", put(GROUPS, torch.zeros(len(GROUP_COLUMNS), 2, dtype=torch.int64).T)),
    ("components' dtype", "components", put(COMPONENTS, torch.zeros(0))),
    ("scales' dtype", "scales", put(SCALES, torch.ones(2))),
    ("hyper's columns", "hyper", put(HYPER, torch.zeros(1, len(HYPER_COLUMNS) + 1, dtype=torch.float64))),
    ("hyper's dtype", "hyper", put(HYPER, torch.zeros(1, len(HYPER_COLUMNS)))),
    ("parameter out of range", "groups: row 1", put_column("parameter", 2, 1)),
    ("negative parameter", "groups: row 1", put_column("parameter", -1, 1)),
    ("hyper out of range", "groups: row 1", put_column("hyper", 1, 1)),
    ("rule out of range", "groups: row 1", put_column("rule", 4, 1)),
    ("manifold out of range", "groups: row 1", put_column("manifold", 6, 1)),
    ("retraction out of range", "groups: row 1", put_column("retraction", -1, 1)),
    ("view out of range", "groups: row 1", put_column("view", 4, 1)),
    ("out_dim out of range", "groups: row 1", put_column("out_dim", 2, 1)),
    ("rows that do not divide", "rows", put_column("rows", 3, 1)),
    ("channel groups that do not divide", "channel_groups", put_column("channel_groups", 3, 1)),
    ("no channel groups", "channel_groups", put_column("channel_groups", 0, 1)),
    ("count beyond the last", "groups: row 1", put_column("count", 5, 1)),
    ("first beyond the last", "groups: row 1", put_column("first", 1, 1)),
    ("negative first", "groups: row 1", put_column("first", -1, 1)),
    ("negative count", "groups: row 1", put_column("count", -1, 1)),
    ("more listed than there are", "groups: row 1", put_column("listed", 1, 1)),
    ("scale out of range", "groups: row 1", put_column("scale", 2, 1)),
    ("scales beyond the last", "groups: row 1", put_column("scale_stride", 1, 1)),
    ("kernels of a matrix", "view", put_column("view", 0, 1)),
]


@pytest.mark.parametrize(("message", "change"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments_raise_before_anything_is_written(message: str, change: Callable[[list[object]], None]) -> None:
    args = arguments()
    if "channel_groups" in message:
        put_column("out_dim", 1, 1)(args)
    change(args)
    tensors = [t for x in args for t in (x if isinstance(x, list) else [x])]
    before = [t.clone() for t in tensors]
    with pytest.raises((ValueError, TypeError), match=message):
        compiled(*args)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_the_valid_call_is_valid() -> None:
    args = arguments()
    compiled(*args)
    assert args[STEPS].tolist() == [1, 1]  # type: ignore[attr-defined]


def test_negative_and_conjugate_views_are_read_as_what_they_say() -> None:
    """A gradient may be a lazy view: -x has the sign in a flag, not in memory."""
    w = place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL)
    lazy = torch.complex(torch.zeros_like(w), torch.randn_like(w)).conj().imag
    assert lazy.is_neg()
    got = run_steps(compiled, [w], [[lazy]], [group(Sphere())], [{}])
    expected = run_steps(compiled, [w], [[lazy.resolve_neg()]], [group(Sphere())], [{}])
    assert torch.equal(got.params[0], expected.params[0])


def test_nothing_to_do() -> None:
    """No parameters, no gradients, no elements, no components."""
    run_steps(compiled, [], [[]], [], [{}])
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL) for _ in range(2)] + [torch.zeros(0, 3, 3, 3)]
    rows = [group(Sphere(), parameter=i) for i in range(3)]
    rows.insert(0, group(Stiefel(), parameter=0, components=torch.empty(0, dtype=torch.int64)))
    grads: list[list[Tensor | None]] = [[torch.randn_like(w[0]), None, torch.zeros(0, 3, 3, 3)]] * 2
    run = run_steps(compiled, w, grads, rows, [{"momentum": 0.9}], fill=math.nan)
    assert run.steps.tolist() == [2, 0, 2]
    assert torch.equal(run.params[1], w[1]) and not torch.equal(run.params[0], w[0])
    assert bool(run.momenta[1].isnan().all())


def test_buffers_are_not_read_before_the_first_step_nor_used_without_momentum() -> None:
    for of, option, shape, layout in ENGINES[:16]:
        w = weight_of(of, shape, layout, torch.float32)
        grad = torch.randn_like(w)
        rows, hyper = [row(of, option, layout)], [{"momentum": 0.9}]
        clean = run_steps(compiled, [w], [[grad]], rows, hyper)
        spoiled = run_steps(compiled, [w], [[grad]], rows, hyper, fill=math.nan)
        assert torch.equal(clean.params[0], spoiled.params[0]) and torch.equal(clean.momenta[0], spoiled.momenta[0])
        if option == "adam_g":
            continue
        plain = run_steps(compiled, clone(clean), [[grad]], rows, [{"momentum": 0.0, "dampening": 0.5}])
        assert torch.equal(plain.momenta[0], clean.momenta[0])
        bare = clone(clean)
        bare.momenta[0] = w.new_empty(0)
        assert torch.equal(run_steps(compiled, bare, [[grad]], rows, [{}]).params[0], plain.params[0])


def test_codes_agree() -> None:
    from manifold_kernels import _C

    assert _C.codes() == {
        "rules": plan.RULES,
        "manifolds": {of.name: of.code for of in manifolds.MANIFOLDS},
        "retractions": manifolds.RETRACTIONS,
        "views": views.VIEWS,
        "group_columns": len(GROUP_COLUMNS),
        "hyper_columns": len(HYPER_COLUMNS),
    }


def test_every_retraction_has_its_kernel() -> None:
    """A plan's number that no kernel knows would silently take another's way: all differ from one another here."""
    w = place_(Stiefel(), torch.randn(2, 3, 3, 3, dtype=torch.float64), KERNEL)
    grad = torch.randn_like(w)
    for of in (Sphere(), Oblique(), Stiefel()):
        place_(of, w, KERNEL)
        ends = [run_steps(compiled, [w], [[grad]], [group(of, retraction=r)], [{}]).params[0] for r in of.retractions]
        for index, end in enumerate(ends):
            assert all(float((end - other).abs().max()) > 1e-6 for other in ends[:index])

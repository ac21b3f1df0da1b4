"""``grad_scale`` and ``found_inf`` of the operator, on every backend and every way through its kernels."""

from __future__ import annotations

import math

import pytest
import torch
from stepping import Run, group, hyper_table, like, place_, run_steps, start
from torch import Tensor
from triton_interpreted import step_ as triton_step

from manifold_kernels import ops
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.ops import Step
from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

KERNEL, FILTER, FLAT = Layout("kernel"), Layout("filter"), Layout("flat")

#: A way through each kernel of each backend: manifold, rule or retraction, shape, view.
ENGINES = [
    ("euclidean", "add", (6, 30), FLAT),
    ("sphere", "projection", (2, 5, 3, 3), KERNEL),
    ("stiefel", "qr", (2, 5, 3, 3), KERNEL),
    ("oblique", "exp", (2, 3, 40, 10), KERNEL),
    ("sphere", "exp", (6, 300), FILTER),
    ("stiefel", "qr", (2, 2, 12, 11), KERNEL),
    ("stiefel", "polar", (2, 2, 40, 3), KERNEL),
    ("scale_invariant", "psi_sgd", (6, 270), FILTER),
    ("grassmann", "sgd_g", (6, 270), FILTER),
    ("grassmann", "adam_g", (6, 270), FILTER),
]
RULES = ("psi_sgd", "sgd_g", "adam_g")
Engine = tuple[str, str, tuple[int, ...], Layout]


def step_of(backend: str) -> Step:
    if backend == "triton":
        return triton_step
    if ops.backends()[backend] is not None:
        pytest.skip(f"the backend {backend} is not there")
    return ops.resolve(backend, torch.device("cpu"))


backends = pytest.mark.parametrize("step", ["reference", "cpu", "triton"], indirect=True)
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Step:
    torch.set_num_threads(1)
    return step_of(request.param)


def weight_of(engine: Engine, dtype: torch.dtype = torch.float32) -> Tensor:
    of, _, shape, layout = engine
    return place_(BY_NAME[of](), torch.randn(shape), layout).to(dtype)


def rows_of(engine: Engine, step_size: str = "general") -> list:
    of, option, _, layout = engine
    how = {"rule": option} if option in RULES else {"retraction": option, "step_size": step_size}
    return [group(of, layout, **how)]


def same(one: Run, other: Run) -> bool:
    return all(
        torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        for mine, theirs in ((one.params, other.params), (one.momenta, other.momenta), (one.variances, other.variances))
        for a, b in zip(mine, theirs, strict=True)
    ) and torch.equal(torch.stack([one.steps, one.nonfinite]), torch.stack([other.steps, other.nonfinite]))


@backends
@engines
@pytest.mark.parametrize(
    ("options", "size"),
    [({"momentum": 0.9, "nesterov": 1.0}, 1e2), ({"momentum": 0.9, "maximize": 1.0}, 1e2), ({}, 1e25)],
    ids=["ahead", "uphill", "huge"],
)
def test_gradients_are_divided_before_everything_else(
    step: Step, engine: Engine, options: dict[str, float], size: float
) -> None:
    """Three steps with scaled gradients have the bits of three with the quotients, for a scale that is no power of two;
    the gradients stay as they are. Squares of the huge ones leave float32."""
    w, scale = weight_of(engine), torch.tensor(48.7)
    if engine[1] in RULES:
        options = {name: value for name, value in options.items() if name != "nesterov"}
    if engine[1] == "adam_g":
        options = {"momentum": 0.9, **options}
    grads = [size * torch.randn_like(w) for _ in range(3)]
    before = [grad.clone() for grad in grads]
    rows = rows_of(engine)
    scaled = run_steps(step, [w], [[grad] for grad in grads], rows, [options], grad_scale=scale)
    plain = run_steps(step, [w], [[grad / scale] for grad in grads], rows, [options])
    assert same(scaled, plain)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


@backends
@engines
def test_small_gradients_survive_in_sixteen_bits(step: Step, engine: Engine) -> None:
    """Quotients below float16's smallest number (6e-8) move the weight: dividing by 2^20 and a learning rate 2^20 times
    as large cancel to the bit, as powers of two do in float32, unless the quotient is rounded to its storage type."""
    if engine[1] in ("sgd_g", "adam_g"):
        return  # their clipping and adaptive step depend on the gradient's size
    w = weight_of(engine, torch.float16)
    grad = (0.01 * torch.randn(w.shape)).half()
    rows = rows_of(engine, "none")
    scaled = run_steps(step, [w], [[grad]], rows, [{"lr": 0.5 * 2**20}], grad_scale=torch.tensor(2.0**20))
    plain = run_steps(step, [w], [[grad]], rows, [{"lr": 0.5}])
    assert same(scaled, plain) and not torch.equal(scaled.params[0], w)


@backends
@engines
def test_nothing_is_written_where_inf_was_found(step: Step, engine: Engine) -> None:
    """The very first step, whose buffers hold NaN, and a later one; ``norms`` become NaN. The step after a skipped one
    has the bits of a run that never met it."""
    w, rows, hyper = weight_of(engine), rows_of(engine), [{"momentum": 0.9}]
    spoiled = torch.randn_like(w)
    spoiled.view(-1)[1] = math.inf
    norms = torch.zeros(1, dtype=torch.float64)
    found, scale = torch.tensor(1.0), torch.tensor(4.0)
    run, untouched = start([w], rows, hyper, fill=math.nan), start([w], rows, hyper, fill=math.nan)
    for grad in (None, torch.randn_like(w), torch.randn_like(w)):
        if grad is not None:
            run_steps(step, untouched, [[grad]], rows, hyper, grad_scale=scale)
            run_steps(step, run, [[grad]], rows, hyper, grad_scale=scale, found_inf=torch.tensor(0.0))
        run_steps(step, run, [[spoiled]], rows, hyper, grad_scale=scale, found_inf=found, norms=norms.fill_(3))
        assert same(run, untouched)
        assert norms.isnan().all()
    assert run.steps.tolist() == [2]


@backends
def test_wrong_numbers_are_named(step: Step) -> None:
    w = torch.randn(2, 3)
    for name, value in (("grad_scale", torch.ones(2)), ("found_inf", torch.ones(1, dtype=torch.float64))):
        with pytest.raises(ValueError, match=f"{name}: wanted one float32 number"):
            run_steps(step, [w], [[like(w)]], [group("euclidean")], [{}], **{name: value})


def test_the_schema_takes_both_by_name() -> None:
    """The registered operator, called as torch.compile and others will: by keyword, without ``norms``."""
    step_of("cpu")
    w, grad = torch.randn(4), torch.randn(4)
    expected = w - 0.1 * (grad / 8)
    run, plan = start([w], [group("euclidean")], [{}]), Plan.build([group("euclidean")], [w])
    torch.ops.manifold_kernels.step_(
        run.params, [grad], run.momenta, run.variances, run.steps, run.nonfinite,
        plan.groups, plan.components, plan.scales, hyper_table([{}]), grad_scale=torch.tensor(8.0),
    )  # fmt: skip
    # Two roundings, of the product and of the difference, where the kernel has one.
    assert torch.allclose(run.params[0], expected, rtol=0, atol=2 * torch.finfo(torch.float32).eps)

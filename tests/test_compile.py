"""``torch.compile``: the operator's contract with the dispatcher, and compiled steps beside eager ones."""

from __future__ import annotations

import pytest
import torch
from stepping import group, hyper_table, place_, start
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, SGDG, AdamG, ops, param_groups
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL, FILTER, FLAT = Layout("kernel"), Layout("filter"), Layout("flat")

CALLS = {
    "stiefel": (("stiefel", KERNEL, {}), {"momentum": 0.9}, {}),
    "norms": (("sphere", KERNEL, {"step_size": "general"}), {}, {"norms": torch.zeros(1, dtype=torch.float64)}),
    "psi": (("scale_invariant", FILTER, {}), {"momentum": 0.9}, {}),
    "adam_g": (("grassmann", FILTER, {"rule": "adam_g"}), {"momentum": 0.9}, {}),
    "scaler": (("euclidean", FLAT, {}), {}, {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}),
    "live": (("oblique", KERNEL, {}), {"momentum": 0.9}, {"live": hyper_table([{"momentum": 0.5}])}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("operator", ["step_", "reference_step_"])
def test_opcheck(name: str, operator: str) -> None:
    """What the schema says of mutations holds, the fake kernel agrees, and graphs with the operator keep its bits."""
    (of, layout, rest), hyper, optional = CALLS[name]
    weights = [place_(BY_NAME[of](), torch.randn(4, 3, 3, 3), layout), torch.randn(5)]
    rows = [group(of, layout, **rest), group("euclidean", parameter=1)]
    run, plan = start(weights, rows, [hyper]), Plan.build(rows, weights)
    if "norms" in optional:
        optional = {"norms": torch.zeros(2, dtype=torch.float64)}
    torch.library.opcheck(
        getattr(torch.ops.manifold_kernels, operator).default,
        (
            run.params,
            [torch.randn(4, 3, 3, 3), None],
            run.momenta,
            run.variances,
            run.steps,
            run.nonfinite,
            plan.groups,
            plan.components,
            plan.scales,
            hyper_table([hyper]),
        ),
        optional,
    )


KINDS = {
    "stiefel": lambda model, **rest: FGSGD(param_groups(model, "stiefel"), momentum=0.9, **rest),
    "oblique": lambda model, **rest: FGSGD(param_groups(model, "oblique"), diagnostics=True, **rest),
    "psi": lambda model, **rest: PSISGD(param_groups(model, "scale_invariant"), momentum=0.9, **rest),
    "sgd_g": lambda model, **rest: SGDG(param_groups(model, "grassmann"), momentum=0.9, **rest),
    "adam_g": lambda model, **rest: AdamG(param_groups(model, "grassmann"), **rest),
    "masters": lambda model, **rest: FGSGD(param_groups(model.bfloat16(), "stiefel"), master_weights=True, **rest),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))


def train(kind: str, lr: float | Tensor, compiler: str | None, backend: str) -> tuple[list[Tensor], list[int]]:
    """Eight steps: learning rates that change and come back, parameters without a gradient, a state loaded halfway."""
    model = network()
    optimizer = KINDS[kind](model, lr=lr, backend=backend)
    step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
    for number, rate in enumerate([0.1, 0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1]):
        for group_ in optimizer.param_groups:
            if isinstance(group_["lr"], Tensor):
                group_["lr"].fill_(rate)
            else:
                group_["lr"] = rate
        if number == 4:
            optimizer.load_state_dict(optimizer.state_dict())
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * number + index)
            grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if (number, index) == (6, 0) else grad
        step()
    counted = [int(state["step"]) for state in optimizer.state.values()]
    return [p.detach().float() for p in model.parameters()], counted


@pytest.mark.parametrize(
    ("kind", "rate", "backend"),
    [*((kind, "tensor", "cpu") for kind in KINDS), ("stiefel", "number", "cpu"), ("adam_g", "tensor", "reference")],
)
def test_a_compiled_step_is_one_graph_with_the_bits_of_an_eager_one(kind: str, rate: str, backend: str) -> None:
    torch._dynamo.reset()

    def lr() -> float | Tensor:
        return 0.1 if rate == "number" else torch.tensor(0.1)

    eager, compiled = train(kind, lr(), None, backend), train(kind, lr(), "aot_eager", backend)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(eager[0], compiled[0], strict=True))
    assert eager[1] == compiled[1]


def test_inductor() -> None:
    """The default compiler, which plans memory by the schema's mutations."""
    torch._dynamo.reset()
    eager = train("stiefel", torch.tensor(0.1), None, "cpu")
    compiled = train("stiefel", torch.tensor(0.1), "inductor", "cpu")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(eager[0], compiled[0], strict=True))


def test_a_learning_rate_in_a_tensor_compiles_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=torch.tensor(0.1))
    # Before the scheduler: it puts a function of its own in the place of step, which dynamo does not enter.
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step()
        optimizer._opt_called = True  # what the scheduler's own step would set
        scheduler.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

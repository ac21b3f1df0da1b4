"""``docs/contract.md``: what no other test proves of it. The page links every promise to its test."""

from __future__ import annotations

import math
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from stepping import Run, group, hyper_table, place_, run_steps, start
from test_amp_operator import step_of
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, AdamG, ops, param_groups
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.plan import Plan
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout, matrices

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

compiled = torch.ops.manifold_kernels.step_.default
KERNEL, FILTER, MATRIX = Layout("kernel"), Layout("filter"), Layout("matrix")

#: Manifold, retraction or rule, shape, view.
CASES = [
    ("sphere", "projection", (2, 3, 3, 3), KERNEL),
    ("sphere", "exp", (2, 100), FILTER),
    ("oblique", "projection", (2, 3, 3, 3), KERNEL),
    ("oblique", "exp", (1, 2, 40, 3), KERNEL),
    ("stiefel", "qr", (2, 3, 3, 3), KERNEL),
    ("stiefel", "qr", (1, 2, 6, 5), KERNEL),
    ("stiefel", "polar", (2, 3, 3, 3), KERNEL),
    ("stiefel", "cayley", (2, 3, 3, 3), KERNEL),
    ("stiefel", "exp", (2, 3, 3, 3), KERNEL),
    ("grassmann", "sgd_g", (2, 50), FILTER),
    ("grassmann", "adam_g", (2, 50), FILTER),
]
RATES = (1e-3, 1.0, 1e3)

#: Violations after any number of steps, in roundings (eps/2) of float32: the worst measured, see docs/contract.md, with
#: a margin of two.
BOUND = 24


def after(steps: int, rate: float) -> list[float]:
    """The violation of every case after so many steps of random gradients, in roundings of float32."""
    weights, rows = [], []
    for position, (of, option, shape, layout) in enumerate(CASES):
        weights.append(place_(BY_NAME[of](), torch.randn(shape), layout))
        rule = {"rule": option} if option in ("sgd_g", "adam_g") else {"retraction": option, "step_size": "none"}
        rows.append(group(of, layout, parameter=position, **rule))
    hyper = [{"lr": rate, "momentum": 0.9}]
    run, plan, table = start(weights, rows, hyper), Plan.build(rows, weights), hyper_table(hyper)
    pool = [[torch.randn_like(weight) for weight in weights] for _ in range(61)]  # a prime: no period of theirs fits
    for number in range(steps):
        compiled(
            run.params, pool[number % 61], run.momenta, run.variances, run.steps, run.nonfinite,
            plan.groups, plan.components, plan.scales, table,
        )  # fmt: skip
    assert int(run.nonfinite.sum()) == 0
    rounding = torch.finfo(torch.float32).eps / 2
    found = []
    for weight, (of, _, _, layout) in zip(run.params, CASES, strict=True):
        violation = GEOMETRIES[BY_NAME[of].code].violation(matrices(weight, layout).double(), 1.0)
        found.append(float(violation.max()) / rounding)
    return found


@pytest.mark.parametrize("rate", RATES)
def test_constraints_hold_after_many_steps_of_any_length(rate: float) -> None:
    torch.set_num_threads(1)
    assert max(after(100_000, rate)) <= BOUND


@pytest.mark.long
@pytest.mark.parametrize("rate", RATES)
def test_constraints_hold_after_a_million_steps(rate: float) -> None:
    torch.set_num_threads(1)
    assert max(after(1_000_000, rate)) <= BOUND


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_elements_beyond_two_to_the_31(backend: str, tmp_path: Path) -> None:
    """Weights and gradients whose elements lie more than 2^31 apart in memory (a file with holes) get the bits of those
    that lie close."""
    step = step_of(backend)
    far = 2**31 + 13
    base = torch.from_file(str(tmp_path / "weights"), shared=True, size=2 * far + 27, dtype=torch.float32)
    for of, shape, layout in (
        ("stiefel", (3, 3, 3, 3), KERNEL),
        ("sphere", (3, 27), FILTER),
        ("euclidean", (3, 27), None),
    ):
        w, grad = torch.randn(shape), torch.randn(shape)
        if layout is not None:
            place_(BY_NAME[of](), w, layout)
        rows = [group(of, layout)]
        near = run_steps(step, [w], [[grad]], rows, [{}])
        weight = base.as_strided(shape, (far, *w.stride()[1:])).copy_(w)
        counts = torch.zeros(2, 1, dtype=torch.int64)
        run = Run([weight], [w.new_empty(0)], [w.new_empty(0)], *counts)
        plan = Plan.build(rows, [weight])
        step(
            run.params, [grad], run.momenta, run.variances, run.steps, run.nonfinite,
            plan.groups, plan.components, plan.scales, hyper_table([{}]),
        )  # fmt: skip
        assert torch.equal(weight, near.params[0])


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 4))
    if seed % 3 == 0:
        return model, FGSGD(param_groups(model, "stiefel"), lr=0.5, momentum=0.9)
    if seed % 3 == 1:
        return model, PSISGD(param_groups(model, "scale_invariant"), lr=0.1, momentum=0.9)
    return model, AdamG(param_groups(model, "grassmann"), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_optimizers_in_threads_do_not_feel_each_other() -> None:
    """Six optimizers of three kinds in six threads, beside the same six one after the other."""
    torch.set_num_threads(2)
    alone = [train(*make(seed), seed, 50) for seed in range(6)]
    made = [make(seed) for seed in range(6)]
    together: dict[int, list[Tensor]] = {}
    ready = threading.Barrier(6)

    def work(seed: int) -> None:
        ready.wait()
        together[seed] = train(*made[seed], seed, 50)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed], strict=True))


class Stepping(torch.utils.data.Dataset):
    """Items that need a step of an optimizer, in whatever process they are made."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return train(*make(index), index, 3)[0]


def load_in_workers(results: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(2)
    train(*make(0), 0, 3)  # threads are there before the workers are forked
    large = nn.Parameter(torch.randn(512, 512))
    large.grad = torch.randn(512, 512)
    FGSGD([large], lr=0.1).step()
    loader = torch.utils.data.DataLoader(Stepping(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    items = list(loader)
    FGSGD([large], lr=0.1).step()  # and work on after it
    results.put([item.flatten()[:3].tolist() for item in items])


def test_workers_forked_from_a_training_process() -> None:
    """DataLoader workers are forks of a process with threads; steps in them, and afterwards in it, come to an end."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=load_in_workers, args=(results,))
    process.start()
    process.join(120)
    hung = process.is_alive()
    process.kill()
    assert not hung and process.exitcode == 0
    expected = [train(*make(index), index, 3)[0].flatten()[:3].tolist() for index in range(4)]
    assert results.get() == expected


def test_rank_deficient_gradients_and_directions() -> None:
    """Gradients of rank one step to the manifold; those along the weight have no tangent part and step nowhere."""
    w = place_(BY_NAME["stiefel"](), torch.randn(4, 4, 3, 3), KERNEL)
    flat = torch.randn(4, 4, 3, 1) @ torch.randn(4, 4, 1, 3)
    rows, hyper = [group("stiefel", KERNEL)], [{"lr": 10.0}]
    run = run_steps(compiled, [w], [[flat]], rows, hyper)
    gram = run.params[0].double().mT @ run.params[0].double()
    assert float((gram - torch.eye(3, dtype=torch.float64)).abs().max()) < BOUND * torch.finfo(torch.float32).eps / 2
    still = run_steps(compiled, [w], [[3 * w]], rows, hyper)
    # lr times the projection's rounding: 10 * 3 * a few eps.
    assert torch.allclose(still.params[0], w, rtol=0, atol=200 * torch.finfo(torch.float32).eps)
    assert math.isfinite(float(still.params[0].sum()))

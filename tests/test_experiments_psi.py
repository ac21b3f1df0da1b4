"""The experiments after [PSI] Figures 1 and 4 measure what they say, and show it."""

import copy
import functools
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def unbalanced() -> dict[str, Any]:
    functions = runpy.run_path(str(EXAMPLES / "unbalanced_start.py"))
    names = functions["main"].__globals__
    names["digits"] = functools.cache(names["digits"])  # reading them takes longer than training here
    return functions


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "toy_problem.py"))


def scale_rows(model: nn.Sequential, factors: Tensor) -> nn.Sequential:
    """A copy with every row of the first layer multiplied by a factor of its own."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(factors[:, None])
    return other


def powers_of_two(count: int) -> Tensor:
    """From 2^-8 to 2^8 in turn: they change no digit of any number on the way."""
    return 2.0 ** torch.linspace(-8, 8, count, dtype=torch.float64).round()


def test_psi_trains_alike_from_both_starts_and_sgd_does_not(unbalanced: dict[str, Any], tmp_path: Path) -> None:
    # A power of two, with rows that stay below the guard: the same curve to the last bit.
    result = unbalanced["main"](iterations=30, batch=64, hidden=16, alpha=256.0, output=tmp_path)
    differences = result["largest relative difference of the curves"]
    assert differences["PSI-SGD"] == differences["PSI-SGDM"] == 0
    final = {(run["method"], run["start"]): run["final_loss"] for run in result["runs"]}
    # Half of log 10, the loss of a guess. What SGD reaches from the unbalanced start, gamma and beta have learnt alone.
    for method in ("SGD", "SGDM"):
        assert max(final[method, "balanced"], final[f"PSI-{method}", "unbalanced"]) < math.log(10) / 2
        assert final[method, "unbalanced"] > 1.5 * final[method, "balanced"]

    assert json.loads((tmp_path / "unbalanced_start.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "unbalanced_start.png").stat().st_size > 0
    assert {"manifold_kernels", "torch", "processor"} <= result["machine"].keys()
    for run in result["runs"]:
        tried = {rate: loss for rate, loss in run["final_losses"].items() if loss is not None}
        assert tried[run["rate"]] == min(tried.values()) == run["final_loss"]
        assert len(run["losses"]) == 30


@pytest.mark.parametrize("method", ["PSI-SGD", "PSI-SGDM"])
def test_the_curves_agree_to_rounding_for_any_alpha(unbalanced: dict[str, Any], method: str) -> None:
    steps, rate = 30, 0.1
    batches = unbalanced["batches_of"](steps, 50, seed=0)

    def losses(model: nn.Sequential) -> Tensor:
        curve = unbalanced["train"](model, unbalanced["optimizer_of"](method, model, rate), batches)
        return torch.tensor(curve, dtype=torch.float64)

    def difference(other: Tensor) -> float:
        return float(((other - curve) / curve).abs().max())

    curve = losses(unbalanced["network"](16, 0, 1.0))
    # Every step rounds, and so does the scaling. How far that is carried is measured by a start that is off by 2^-20.
    offset = 2.0**-20
    nearby = unbalanced["network"](16, 0, 1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (nearby[0], nearby[3]):
            noise = torch.randn(layer.weight.shape, dtype=torch.float64, generator=generator)
            layer.weight.mul_(1 + offset * noise)
    growth = max(1.0, difference(losses(nearby)) / offset)
    # 1e4 is no power of two, and the guard at 1e4 divides the long rows: 2^-53 in each of the steps, with a factor of 8
    # for the several operations of a step.
    bound = 8 * steps * growth * 2.0**-53
    assert difference(losses(unbalanced["network"](16, 0, 1e4))) <= bound < 1e-11


def test_the_normalised_gradient_is_the_gradient_at_the_normalised_weights(toy: dict[str, Any]) -> None:
    inputs, labels = toy["problem"](0, samples=200)
    model = toy["network"](0, hidden=20)
    normalised, raw, rest, loss = toy["measure"](model, inputs, labels).tolist()
    unit = scale_rows(model, 1 / model[0].weight.detach().norm(dim=1))
    loss_there = nn.functional.mse_loss(unit(inputs), labels)
    at_weight, *others = torch.autograd.grad(loss_there, list(unit.parameters()))
    # A thousand operations on numbers of order one, at 2^-53 each.
    assert normalised == pytest.approx(float(at_weight.norm()), rel=1e-12)
    assert rest == pytest.approx(math.hypot(*(float(other.norm()) for other in others)), rel=1e-12)
    assert loss == pytest.approx(loss_there.item(), rel=1e-12)
    assert raw < 0.9 * normalised  # He initialisation has rows of norm sqrt(2): the two measures differ


def test_psi_gd_descends_alike_from_equivalent_starts_and_as_theorem_2_says(toy: dict[str, Any]) -> None:
    """[PSI] Theorems 1 and 2, the latter before its telescoping sum is bounded by the best loss."""
    rate, seed = 0.005, 0
    setting = toy["Setting"](batch=None, rest_rate=rate, iterations=60, every=1, samples=200, hidden=20)
    data = toy["problem"](seed, setting.samples)
    model = toy["network"](seed, setting.hidden)
    scaled = scale_rows(model, powers_of_two(setting.hidden))
    curve, scaled_curve = (
        toy["train"](one, toy["METHODS"]["PSI-SGD"].optimizers(one, rate, rate), *data, setting, seed)
        for one in (model, scaled)
    )
    normalised, raw, rest, loss = scaled_curve.T
    torch.testing.assert_close(rest, curve[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(loss, curve[:, 3], rtol=0, atol=0)
    # The norm of the vector of rows is summed after scaling back, row by row without rounding.
    torch.testing.assert_close(normalised, curve[:, 0], rtol=0, atol=0)
    assert float((raw / curve[:, 1]).min()) > 10  # the raw gradient does feel the scale

    # A step along the gradient changes the loss by -rate ||grad||^2 to first order, and with rate <= 1/L the second
    # order is at most half of that (Theorem 2's choice of rate; here it is smaller still).
    first_order = rate * float((normalised[:-1] ** 2 + rest[:-1] ** 2).sum())
    assert 0.5 * first_order <= float(loss[0] - loss[-1]) <= 1.5 * first_order
    assert float((loss[1:] - loss[:-1]).max()) < 0


def test_the_comparison_reports_what_it_chose_and_how(toy: dict[str, Any], tmp_path: Path) -> None:
    result = toy["main"](
        iterations=6, every=3, batch=16, samples=60, hidden=8, seeds=3, tuning_seeds=1, output=tmp_path
    )
    assert (tmp_path / "toy_problem.png").stat().st_size > 0
    written = json.loads((tmp_path / "toy_problem.json").read_text())
    assert {"manifold_kernels", "torch", "processor"} <= written["machine"].keys()
    assert written["order"] == result["order"]
    methods = toy["METHODS"]
    for title, reports in result["results"].items():
        tuned = title.endswith("tuned")
        assert set(reports) == {name for name, method in methods.items() if tuned or method.paper_rate}
        for name, report in reports.items():
            if tuned:
                assert tuple(report["grid"]) == methods[name].rates
                assert report["grid"][report["rate"]] == min(report["grid"].values())
            else:
                assert report["rate"] == methods[name].paper_rate
            for curve in report["curves"].values():
                low, median, high = (torch.tensor(curve[part]) for part in ("low", "median", "high"))
                assert len(median) == 3 and bool((low <= median).all()) and bool((median <= high).all())
        # All start from the same directions. SGD-G has normalised its rows, which only the raw gradient feels.
        starts = {
            measure: [one["curves"][measure]["median"][0] for one in reports.values()] for measure in toy["MEASURES"]
        }
        for measure in ("normalised gradient", "gradient of the rest", "loss"):
            assert max(starts[measure]) == pytest.approx(min(starts[measure]), rel=1e-12)
        assert max(starts["raw gradient"]) > 1.1 * min(starts["raw gradient"])
        means = [reports[name]["geometric_means"]["raw gradient"] for name in result["order"][title]["raw gradient"]]
        assert means == sorted(means)


@pytest.mark.parametrize(
    "arguments, message", [({"iterations": 5, "every": 2}, "multiple of every=2"), ({"batch": 2000}, "samples=1000")]
)
def test_the_comparison_refuses_what_does_not_fit(toy: dict[str, Any], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        toy["main"](**arguments)

"""What stands around a step in other people's training loops: averages, pure functions, clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manifold_kernels import (
    FGSGD,
    PSISGD,
    SGDG,
    AdamG,
    Renormalizer,
    param_groups,
    partition,
    verify_scale_invariant,
)
from manifold_kernels.norms import weight_norms
from manifold_kernels.optim import project_average_, pure


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    ).eval()


def loss_of(model: nn.Module, batch: int) -> torch.Tensor:
    x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(batch))
    return (model(x) - 1).square().mean()


MAKERS = {
    "stiefel": lambda model: FGSGD(param_groups(model, "stiefel", linear="sphere"), lr=0.5, momentum=0.9),
    "oblique": lambda model: FGSGD(param_groups(model, "oblique"), lr=torch.tensor(0.5, device="cpu"), momentum=0.9),
    "pio": lambda model: FGSGD(partition(model, "pio", ["sphere", "stiefel", None]), lr=0.5),
    "psi": lambda model: PSISGD(param_groups(model, "scale_invariant"), lr=0.1, momentum=0.9),
    "sgd_g": lambda model: SGDG(param_groups(model, "grassmann"), lr=0.1),
    "adam_g": lambda model: AdamG(param_groups(model, "grassmann"), lr=0.05),
}


@pytest.mark.parametrize("name", ["stiefel", "pio", "adam_g"])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages_go_back_to_their_manifolds(name: str, kind: str) -> None:
    """The average of a training is off its manifolds; projected, it is on them, and no point of them is nearer."""
    model = network()
    optimizer = MAKERS[name](model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if kind == "ema" else None)
    for batch in range(6):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)
    mean = [p.detach().clone() for p in average.module.parameters()]
    trained = [p.detach().clone() for p in model.parameters()]
    current = optimizer.violation()

    def violation(weights: list[torch.Tensor]) -> float:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(weight)
        return optimizer.violation()

    assert violation(mean) > 100 * current
    project_average_(average, optimizer)
    projected = [p.detach().clone() for p in average.module.parameters()]
    assert violation(projected) < 1e-6  # roundings of numbers below 1, at most nine in a sum
    for centre, near, other in zip(mean, projected, trained, strict=True):
        assert (centre - near).norm() <= (centre - other).norm()


def test_an_average_of_another_model_is_refused() -> None:
    optimizer = MAKERS["stiefel"](network())
    other = nn.Sequential(nn.Conv2d(2, 4, 3))
    before = other[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"average: wanted a parameter 0\.weight of shape \(5, 2, 3, 3\)"):
        project_average_(AveragedModel(other), optimizer)
    assert torch.equal(other[0].weight, before)


@pytest.mark.parametrize("name", MAKERS)
def test_pure_steps_have_the_bits_of_the_optimizers(name: str) -> None:
    """Beside an optimizer on a twin, with a learning rate that changes; what goes in stays as it is, and so does the
    optimizer that describes the step."""
    model, twin = network(), network()
    description, optimizer = MAKERS[name](model), MAKERS[name](twin)
    frozen = [p.detach().clone() for p in model.parameters()]
    params, state = pure.initial(description)

    def loss(params: dict[str, torch.Tensor], batch: int) -> torch.Tensor:
        x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(batch))
        return (functional_call(model, params, x) - 1).square().mean()

    for batch in range(4):
        optimizer.zero_grad()
        loss_of(twin, batch).backward()
        optimizer.step()
        gradient = grad(loss)(params, batch)
        before = {key: value.clone() for key, value in params.items()}
        old_params, old_state = params, state
        params, state = pure.step(description, params, gradient, state)
        assert all(torch.equal(old_params[key], value) for key, value in before.items())
        assert old_state.steps.tolist() == [batch] * len(params)
        for own, other in ((description, 0.3), (optimizer, 0.3)):
            for group in own.param_groups:
                group["lr"] = other
    assert all(torch.equal(params[key], theirs) for key, theirs in twin.named_parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), frozen, strict=True))
    assert not description.state


def test_clipping_the_norm_of_gradients() -> None:
    """After ``clip_grad_norm_`` no group's R is longer than the clipped gradient."""
    model = network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=1.0, diagnostics=True)
    (1e4 * loss_of(model, 0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    found = optimizer.diagnostics()
    assert bool((found.norm <= 0.5 * (1 + 1e-5)).all())  # a projection makes nothing longer


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_default_device_is_not_where_tables_go(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.set_default_device("cuda")`` at the top of a script, here with a device that has no memory: everything is
    made, stepped, saved and loaded with the bits of a training without."""
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", backend)

    def train(device: str) -> list[torch.Tensor]:
        model = network()
        inputs = [torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(batch)) for batch in range(4)]
        with torch.device(device):
            optimizer = MAKERS[name](model)
            for x in inputs:
                optimizer.zero_grad()
                (model(x) - 1).square().mean().backward()
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.rebind(model)
            average = AveragedModel(model)
            project_average_(average, optimizer)
            params, state = pure.initial(optimizer)
            params, _ = pure.step(optimizer, params, {key: p.grad for key, p in model.named_parameters()}, state)
            optimizer.check()
            norms = [each.components for each in weight_norms(optimizer)]
        return [*model.parameters(), *average.module.parameters(), *params.values(), *norms]

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(train("cpu"), train("meta"), strict=True))


def test_a_default_device_is_not_where_scales_go() -> None:
    def renormalized(device: str) -> torch.Tensor:
        model, x = network(), torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1))
        with torch.device(device):
            optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, diagnostics=True)
            renormalizer = Renormalizer(model, optimizer)
            renormalizer.trace(x)
            renormalizer.step()
            model(x).square().mean().backward()
            optimizer.step()
            found = optimizer.diagnostics()
            verify_scale_invariant(model, x)
        return torch.cat([model[0].weight.detach().double().flatten(), found.norm, found.tau, found.component])

    assert torch.equal(renormalized("cpu"), renormalized("meta"))

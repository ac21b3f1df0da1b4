"""Optimizers are ``torch.optim.Optimizer`` to the letter: Euclidean groups take torch's steps bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from manifold_kernels import ops
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG

BACKENDS = [name for name, reason in ops.backends().items() if reason is None]
SHAPES = ((4, 3, 3, 3), (5, 7), (6,), (), (2, 0))
SETTINGS = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 5e-4, "maximize": True},
    {"weight_decay": 1e-2},
)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    made[0].data = made[0].data.contiguous(memory_format=torch.channels_last)
    return made


def set_gradients(step: int, *lists: list[nn.Parameter], skip: int | None = None) -> None:
    """The same gradients for every list; the parameter ``skip`` gets none."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, twins in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(twins[0].shape, generator=generator).to(twins[0].dtype)
        for parameter in twins:
            parameter.grad = None if number == skip else grad.clone(memory_format=torch.preserve_format)


def assert_same_bits(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def sgd(params: object, **settings: object) -> torch.optim.SGD:
    return torch.optim.SGD(params, foreach=False, fused=False, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_euclidean_steps_are_torchs(backend: str, dtype: torch.dtype, settings: dict) -> None:
    ours, theirs = parameters(0, dtype), parameters(0, dtype)
    mine, other = FGSGD(ours, lr=0.1, backend=backend, **settings), sgd(theirs, lr=0.1, **settings)
    for step in range(4):
        set_gradients(step, ours, theirs, skip=1 if step < 2 else None)  # parameter 1 starts later
        mine.step()
        other.step()
    assert_same_bits(ours, theirs)
    if settings.get("momentum"):
        for a, b in zip(ours, theirs, strict=True):
            buffer = other.state[b].get("momentum_buffer")
            torch.testing.assert_close(mine.state[a]["momentum_buffer"], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_16_bit_steps_are_torchs_in_float32_rounded(backend: str, dtype: torch.dtype, settings: dict) -> None:
    # Torch rounds to 16 bits after every operation, here arithmetic is float32. From the same 16-bit start, torch's
    # step in float32 differs by the rounding of w, u |w|, and by that of the buffer before it is stepped along,
    # lr u |d| (at most |G| + 2 |M| with nesterov). u = eps/2; 1 % for the roundings of float32.
    ours, wide = parameters(0, dtype), parameters(0)
    mine, other = FGSGD(ours, lr=0.1, backend=backend, **settings), sgd(wide, lr=0.1, **settings)
    u = torch.finfo(dtype).eps / 2
    for step in range(4):
        set_gradients(step, ours)
        for a, b in zip(ours, wide, strict=True):
            b.data = a.detach().float()
            b.grad = a.grad.float()
            if step and settings.get("momentum"):
                other.state[b]["momentum_buffer"] = mine.state[a]["momentum_buffer"].float()
        mine.step()
        other.step()
        for a, b in zip(ours, wide, strict=True):
            moved = b.grad.abs() + 2 * other.state[b].get("momentum_buffer", b.grad).abs()
            assert bool(((a.float() - b).abs() <= 1.01 * u * (b.abs() + 0.1 * moved)).all())


@pytest.mark.parametrize("kind", [FGSGD, PSISGD, SGDG, AdamG])
def test_every_optimizer_takes_torchs_step_where_there_is_no_manifold(backend: str, kind: type) -> None:
    ours, theirs = parameters(1), parameters(1)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    mine, other = kind(ours, backend=backend, **settings), sgd(theirs, **settings)
    for step in range(3):
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
    assert_same_bits(ours, theirs)


def schedulers(optimizer: torch.optim.Optimizer) -> list[torch.optim.lr_scheduler.LRScheduler]:
    # The second cycles the momentum too; both write to param_groups.
    return [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch) ** 0.6),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=8),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_schedulers(backend: str, which: int) -> None:
    ours, theirs = parameters(2), parameters(2)
    mine, other = FGSGD(ours, lr=0.2, momentum=0.9, backend=backend), sgd(theirs, lr=0.2, momentum=0.9)
    pair = schedulers(mine)[which], schedulers(other)[which]
    for step in range(6):
        set_gradients(step, ours, theirs)
        for optimizer, scheduler in zip((mine, other), pair, strict=True):
            optimizer.step()
            scheduler.step()
    assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"] != 0.2
    assert_same_bits(ours, theirs)


def test_a_learning_rate_in_a_tensor_may_change_in_place(backend: str) -> None:
    ours, theirs = parameters(3), parameters(3)
    rate = torch.tensor(0.1, dtype=torch.float64)
    mine, other = FGSGD(ours, lr=rate, backend=backend), sgd(theirs, lr=0.1)
    for step, value in enumerate((0.1, 0.05, 0.2)):
        rate.fill_(value)
        other.param_groups[0]["lr"] = value
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_of_one_element_may_have_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    weight, rate = nn.Parameter(torch.ones(2)), torch.full(shape, 0.5)
    optimizer = FGSGD([weight], lr=rate, backend=backend)
    for value, expected in ((0.5, 0.5), (0.25, 0.25)):
        rate.fill_(value)
        weight.grad = torch.ones(2)
        optimizer.step()
        assert weight.tolist() == [expected] * 2


def test_settings_may_change_between_steps(backend: str) -> None:
    # Momentum off, on (with dampening: the first step with momentum takes the gradient itself), off, on again.
    ours, theirs = parameters(4), parameters(4)
    mine, other = FGSGD(ours, lr=0.1, dampening=0.5, backend=backend), sgd(theirs, lr=0.1, dampening=0.5)
    for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.8)):
        for optimizer in (mine, other):
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.param_groups[0]["weight_decay"] = 0.01 * step
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
    assert_same_bits(ours, theirs)


def test_groups_have_settings_of_their_own_and_can_be_added(backend: str) -> None:
    ours, theirs = parameters(5), parameters(5)
    pair = [
        FGSGD([{"params": ours[:2], "lr": 0.3}], lr=0.1, momentum=0.9, backend=backend),
        sgd([{"params": theirs[:2], "lr": 0.3}], lr=0.1, momentum=0.9),
    ]
    for step in range(4):
        if step == 2:
            pair[0].add_param_group({"params": iter(ours[2:]), "momentum": 0.5, "nesterov": True})
            pair[1].add_param_group({"params": iter(theirs[2:]), "momentum": 0.5, "nesterov": True})
        set_gradients(step, ours, theirs)
        for optimizer in pair:
            optimizer.step()
    assert_same_bits(ours, theirs)


def test_clearing_the_state_starts_anew(backend: str) -> None:
    ours, theirs = parameters(6), parameters(6)
    pair = FGSGD(ours, lr=0.1, momentum=0.9, backend=backend), sgd(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        set_gradients(step, ours, theirs)
        for optimizer in pair:
            if step == 2:
                optimizer.state.clear()
            optimizer.step()
    assert_same_bits(ours, theirs)


def test_nan_and_inf_are_written_through_as_in_torch(backend: str) -> None:
    ours, theirs = parameters(7), parameters(7)
    mine, other = FGSGD(ours, lr=0.1, momentum=0.9, backend=backend), sgd(theirs, lr=0.1, momentum=0.9)
    set_gradients(0, ours, theirs)
    for lists in (ours, theirs):
        lists[1].grad[0, 0], lists[1].grad[1, 1] = torch.nan, torch.inf
    mine.step()
    other.step()
    assert_same_bits(ours, theirs)
    assert mine.nonfinite_count() == 0


def test_parameters_whose_elements_are_not_dense(backend: str) -> None:
    def sliced() -> list[nn.Parameter]:
        return [nn.Parameter(torch.arange(24.0).reshape(4, 6)[:, ::2])]

    ours, theirs = sliced(), sliced()
    mine, other = FGSGD(ours, lr=0.1, momentum=0.9, backend=backend), sgd(theirs, lr=0.1, momentum=0.9)
    for step in range(2):
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
    assert_same_bits(ours, theirs)


def test_a_learning_rate_of_zero_leaves_weights_to_the_bit(backend: str) -> None:
    """A retraction of nothing would still round; momentum goes on."""
    weight = nn.Parameter(torch.linalg.qr(torch.randn(50, 3, 3))[0].unsqueeze(0).contiguous())
    before = weight.detach().clone()
    optimizer = FGSGD([weight], lr=0.0, momentum=0.9, manifold="stiefel", backend=backend)
    for number in range(2):
        weight.grad = torch.full_like(weight, 1.0 + number)
        optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full_like(weight, 0.9 + 2.0))


def test_closure(backend: str) -> None:
    weight = nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = FGSGD([weight], lr=0.5, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 5.0
    assert weight.tolist() == [1.5, -0.5]  # w - 0.5 w


def test_no_gradient_no_step(backend: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = FGSGD([weight], lr=0.5, momentum=0.9, weight_decay=0.1, backend=backend)
    optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    assert int(optimizer.state[weight]["step"]) == 0


def test_gradients_are_not_written_and_zero_grad_works(backend: str) -> None:
    ours = parameters(8)
    optimizer = FGSGD(ours, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True, backend=backend)
    set_gradients(0, ours)
    before = [p.grad.clone() for p in ours]
    optimizer.step()
    for parameter, grad in zip(ours, before, strict=True):
        assert torch.equal(parameter.grad, grad)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in ours)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours)


def test_hooks(backend: str) -> None:
    ours = parameters(9)
    optimizer = FGSGD(ours, lr=0.1, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "renamed": seen.append(state["note"])})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    set_gradients(0, ours)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "save", "kept", "loaded"]


def test_named_parameters(backend: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = FGSGD(layer.named_parameters(), lr=0.1, backend=backend)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    layer.bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match=r"parameter 1 \(bias\) of shape \(2,\)"):
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alone(backend: str, copied: object) -> None:
    ours = parameters(10)
    optimizer = FGSGD(ours, lr=0.1, momentum=0.9, backend=backend, nonfinite="raise")
    set_gradients(0, ours)
    optimizer.step()
    twins, twin = copied((ours, optimizer))
    before = [p.detach().clone() for p in ours]
    set_gradients(1, twins)
    twin.step()
    assert_same_bits(ours, before)  # nothing is shared
    set_gradients(1, ours)
    optimizer.step()
    assert_same_bits(ours, twins)
    assert int(twin.state[twins[0]]["step"]) == 2
    twins[2].grad[0] = torch.nan
    with pytest.raises(ValueError, match="finite"):  # options are copied too
        twin.step()


def test_grad_scaler_skips_a_step_of_infinite_gradients(backend: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = FGSGD([weight], lr=0.5, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((torch.inf, [1.0, 1.0]), (1.0, [0.5, 0.5])):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == expected

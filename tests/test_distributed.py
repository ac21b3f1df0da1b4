"""Two and three processes over gloo beside one: replicas, shards, ZeRO and distributed checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from manifold_kernels import FGSGD, param_groups

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import distributed_worker as worker

from manifold_kernels.bench.measure import threads

HERE = Path(__file__).parent


Found = dict[str, Any]


def run(folder: Path, world: int) -> list[Found]:
    """What so many processes found."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    command = [sys.executable, "-X", "faulthandler", str(HERE / "distributed_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    """What the two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run(folder, worker.WORLD)


@pytest.fixture(scope="module")
def three_ranks(ranks: tuple[Path, list[Found]]) -> list[Found]:
    """What three processes found, which have the folder of the two."""
    return run(ranks[0], 3)


def close(mine: list[Tensor], theirs: list[Tensor], roundings: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=roundings * torch.finfo(torch.float32).eps)


def test_replicas_stay_equal_to_the_bit(ranks: tuple[Path, list[Found]]) -> None:
    mine, theirs = (found["ddp"] for found in ranks[1])
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def alone(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and the norms of groups without ranks."""
    model = worker.network()
    optimizer = worker.OPTIMIZERS[name](model)
    norms = []
    for number in range(4):
        for parameter, grad in zip(model.parameters(), worker.gradients(model, number), strict=True):
            parameter.grad = grad
        optimizer.step()
        norms.append(worker.shared_norms(optimizer))
    return [parameter.detach() for parameter in model.parameters()], norms


@pytest.mark.parametrize("name", worker.OPTIMIZERS)
def test_shards_step_as_the_whole(name: str, ranks: tuple[Path, list[Found]]) -> None:
    """The same gradients in shards: R of groups over both ranks is that of the whole, and so are the weights.

    R is a sum of about 90 squares in float32 per rank whose order differs: 1e-5 of it. Four steps of lr/tau R < 0.21
    each move weights by that part of a step, and by some roundings of their own.
    """
    weights, norms = alone(name)
    for found in ranks[1]:
        for mine, theirs in zip(found[name]["norms"], norms, strict=True):
            assert len(mine) and torch.allclose(mine, theirs, rtol=1e-5, atol=0)
        close(found[name]["params"], weights, roundings=100)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        (model(worker.batch(number)) - 1).square().mean().backward()
        optimizer.step()


def test_a_fully_sharded_training_is_that_of_one_process(ranks: tuple[Path, list[Found]]) -> None:
    """Each rank sees half of the batch; gradients are averages, so that one process with all of it takes the same five
    steps but for rounding, which five steps of a smooth net amplify by less than ten."""
    model = worker.network()
    model[1].eval()
    optimizer = worker.OPTIMIZERS["layer"](model)
    train(model, optimizer, range(5))
    for found in ranks[1]:
        close(found["fsdp"]["params"], [p.detach() for p in model.parameters()], roundings=1000)


def test_a_distributed_checkpoint_resumes_to_the_bit(ranks: tuple[Path, list[Found]]) -> None:
    for found in ranks[1]:
        pairs = zip(found["fsdp"]["params"], found["fsdp"]["resumed"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_distributed_checkpoint_goes_on_in_one_process(ranks: tuple[Path, list[Found]]) -> None:
    """Saved by two ranks, loaded without any: momentum and steps are there, and training goes on as theirs did."""
    folder, (found, _) = ranks
    model = worker.network()
    model[1].eval()
    optimizer = worker.OPTIMIZERS["layer"](model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    train(model, optimizer, range(3, 5))
    close(found["fsdp"]["params"], [p.detach() for p in model.parameters()], roundings=1000)


def test_rows_in_shards_have_their_second_moments_in_shards(ranks: tuple[Path, list[Found]]) -> None:
    """Rows do not feel each other: AdamG on shards, through a distributed checkpoint, has the bits of one process."""
    model, optimizer = worker.rows()
    for number in range(3):
        model[0].weight.grad = worker.gradients(model, number)[0]
        optimizer.step()
    own = optimizer.state[model[0].weight]
    for found in ranks[1]:
        for mine, theirs in zip(found["rows"], [model[0].weight, own["exp_avg"], own["exp_avg_sq"]], strict=True):
            assert torch.equal(mine, theirs)


def test_a_view_whose_matrices_are_cut_is_refused(ranks: tuple[Path, list[Found]]) -> None:
    for found in ranks[1]:
        assert "0.weight" in found["cut"] and "'matrix' has matrices over several ranks" in found["cut"]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("how", worker.CUTS)
@pytest.mark.parametrize("name", worker.GATHERED)
def test_gathered_matrices_step_as_the_whole(
    name: str, how: str, ranks: tuple[Path, list[Found]], three_ranks: list[Found]
) -> None:
    """Every rank steps the whole matrix: weights, states and R have the bits of one process, whatever the cut."""
    model = worker.layers()
    optimizer = worker.GATHERED[name](model)
    worker.given_steps(model, optimizer, range(3))
    expected, norms = worker.everything(model, optimizer), worker.norms_of_matrices(optimizer)
    for found in (*ranks[1], *three_ranks):
        if (name, how) not in found["gathered"]:
            continue
        assert same(found["gathered"][name, how]["states"], expected)
        if (name, how) != ("pio", "outputs"):  # kernels stay whole there, and their groups lie on several ranks
            assert torch.equal(found["gathered"][name, how]["norms"], norms)


def test_one_collective_at_a_time(ranks: tuple[Path, list[Found]]) -> None:
    """Three matrices, one after the other: with several under way, torch's gloo corrupts the heap now and then."""
    for found in ranks[1]:
        assert found["collectives"] == (3, 1)


def test_a_fully_sharded_training_of_gathered_matrices_is_that_of_one_process(ranks: tuple[Path, list[Found]]) -> None:
    """Means of two equal gradients are exact, so that gradients, and all that follows, have the same bits."""
    model = worker.layers().eval()
    optimizer = worker.GATHERED["matrices"](model)
    with threads(1):  # as the ranks have: the gradients of convolutions depend on it
        worker.train_layers(model, optimizer)
    for found in ranks[1]:
        assert same(found["gathered training"], worker.everything(model, optimizer))


@pytest.mark.parametrize("how", worker.CUTS)
def test_what_else_writes_gathered_matrices(how: str, ranks: tuple[Path, list[Found]]) -> None:
    model = worker.layers()
    expected = worker.around(model, worker.GATHERED["matrices"](model))
    for found in ranks[1]:
        assert same(found["gathered around"][how]["average"], expected["average"])
        assert torch.equal(found["gathered around"][how]["rescaled"], expected["rescaled"])


def test_an_average_without_shards_is_refused(ranks: tuple[Path, list[Found]]) -> None:
    """What a plan says of shards is nothing about whole weights."""
    for found in ranks[1]:
        assert "average: wanted 0.weight in shards" in found["whole average"]


def test_gathered_matrices_go_on_over_another_number_of_ranks(
    ranks: tuple[Path, list[Found]], three_ranks: list[Found]
) -> None:
    """Saved by two ranks after two steps, and loaded by three: the third step has the same bits."""
    for found in three_ranks:
        assert same(found["gathered, saved"], ranks[1][0]["gathered, saved"])


def test_gradients_that_are_cut_otherwise_are_brought_in_line(ranks: tuple[Path, list[Found]]) -> None:
    """1 - (1 + 2), on all ranks."""
    for found in ranks[1]:
        assert same(found["gradients"], [torch.full((4, 3), -2.0)] * 2)


def test_zero_redundancy_steps_as_the_whole(ranks: tuple[Path, list[Found]]) -> None:
    """ZeRO gives whole parameters to ranks: the same bits, also after its own way of loading a state, which is to put
    other buffers into the optimizers of the ranks."""
    model = worker.network()
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.5, momentum=0.9)
    for number in range(4):
        for parameter, grad in zip(model.parameters(), worker.gradients(model, number), strict=True):
            parameter.grad = grad
        optimizer.step()
    for found in ranks[1]:
        for weights in found["zero"].values():
            assert same(weights, list(model.parameters()))

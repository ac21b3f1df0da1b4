"""One of two processes of ``test_distributed.py``: ``python distributed_worker.py RANK FOLDER``.

They meet in a file, talk over gloo, and leave what they found in ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from manifold_kernels import FGSGD, AdamG, param_groups, partition

WORLD = 2


def network() -> nn.Sequential:
    """Five outputs, of which one rank has three and the other two; a transposed convolution, cut along its inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


def batch(number: int, rank: int | None = None) -> Tensor:
    """Eight images, or the half of them that belongs to a rank."""
    x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(number))
    return x if rank is None else x.chunk(WORLD)[rank]


OPTIMIZERS: dict[str, Any] = {
    "layer": lambda model: FGSGD(
        param_groups(model, "stiefel", linear={"manifold": "sphere", "view": "filter"}),
        lr=0.5,
        momentum=0.9,
        diagnostics=True,
    ),
    "pio": lambda model: FGSGD(
        partition(model, "pio", ["sphere", "oblique", None], seed=2), lr=0.5, momentum=0.9, diagnostics=True
    ),
}


def gradients(model: nn.Module, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [3 * torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


def shared_norms(optimizer: FGSGD) -> Tensor:
    """R of the groups of more than one component on a manifold, wherever these lie."""
    found = optimizer.diagnostics()
    sharing = (found.component == -1) & (found.parameter == found.parameter[0])
    return found.norm[sharing].clone()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def replicas(rank: int) -> list[Tensor]:
    """A thousand steps on data of one's own, gradients averaged by DDP."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.3, momentum=0.9)
    replica = DistributedDataParallel(model)
    for number in range(1000):
        optimizer.zero_grad()
        (replica(batch(number, rank)) - 1).square().mean().backward()
        optimizer.step()
    return [whole(parameter) for parameter in model.parameters()]


def shards_with_given_gradients(name: str) -> dict[str, Any]:
    """Every rank steps its shards along shards of the same gradients."""
    model = network()
    optimizer = OPTIMIZERS[name](model)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model, mesh=mesh)
    optimizer.rebind(model)
    norms = []
    for number in range(4):
        for parameter, grad in zip(model.parameters(), gradients(model, number), strict=True):
            parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
        norms.append(shared_norms(optimizer))
    return {"params": [whole(p) for p in model.parameters()], "norms": norms}


def rows() -> tuple[nn.Module, AdamG]:
    """Five rows of unit norm; one row more than a rank's share is on the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5, bias=False))
    model[0].weight.data = nn.functional.normalize(model[0].weight.data, dim=1)
    groups = [{"params": [("0.weight", model[0].weight)], "manifold": "grassmann"}]
    return model, AdamG(groups, lr=0.05)


def sharded_rows(folder: Path) -> list[Tensor]:
    """Three steps of AdamG on shards, saved and loaded after two: weight, first and second moments."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def made() -> tuple[nn.Module, AdamG]:
        model, optimizer = rows()
        fully_shard(model, mesh=mesh)
        optimizer.rebind(model)
        return model, optimizer

    def step(model: nn.Module, optimizer: AdamG, number: int) -> None:
        model[0].weight.grad = distribute_tensor(gradients(model, number)[0], mesh, [Shard(0)])
        optimizer.step()

    model, optimizer = made()
    for number in range(2):
        step(model, optimizer, number)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=str(folder / "rows"))
    model, optimizer = made()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=str(folder / "rows"))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step(model, optimizer, 2)
    own = optimizer.state[model[0].weight]
    return [whole(model[0].weight), whole(own["exp_avg"]), whole(own["exp_avg_sq"])]


def fully_sharded(rank: int, folder: Path) -> dict[str, Any]:
    """Forward, backward and step of a sharded model, saved and loaded on the way by torch's distributed checkpoints."""
    out: dict[str, Any] = {}

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        model[1].eval()  # statistics of a half batch would be others
        optimizer = OPTIMIZERS["layer"](model)
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        optimizer.rebind(model)
        return model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            (model(batch(number, rank)) - 1).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(3))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=str(folder / "checkpoint"))
    train(model, optimizer, range(3, 5))
    out["params"] = [whole(p) for p in model.parameters()]

    model, optimizer = made()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(3, 5))
    out["resumed"] = [whole(p) for p in model.parameters()]
    return out


def cut_matrices() -> str:
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = FGSGD(param_groups(model, None, linear="stiefel"), lr=0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    try:
        optimizer.rebind(model)
    except ValueError as error:
        return str(error)
    return ""


def zero(rank: int) -> list[Tensor]:
    """Every rank steps some of the parameters and tells the others."""
    model = network()
    groups = [
        {name: value for name, value in group.items() if name not in ("names", "param_names")}
        for group in param_groups(model, "stiefel")
    ]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=FGSGD, lr=0.5, momentum=0.9)
    for number in range(4):
        for parameter, grad in zip(model.parameters(), gradients(model, number), strict=True):
            parameter.grad = grad
        optimizer.step()
    return [whole(parameter) for parameter in model.parameters()]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    found = {
        "ddp": replicas(rank),
        **{name: shards_with_given_gradients(name) for name in ("layer", "pio")},
        "fsdp": fully_sharded(rank, folder),
        "rows": sharded_rows(folder),
        "cut": cut_matrices(),
        "zero": zero(rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

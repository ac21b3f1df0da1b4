"""One of two or three processes of ``test_distributed.py``: ``python distributed_worker.py RANK WORLD FOLDER``.

They meet in a file, talk over gloo, and leave what they found in ``FOLDER/RANK-of-WORLD.pt``.
"""

from __future__ import annotations

import io
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import FGSGD, PSISGD, AdamG, param_groups, partition
from manifold_kernels.manifolds import Euclidean, Stiefel
from manifold_kernels.optim import ManifoldOptimizer, project_average_

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


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices of five, seven and eight rows and columns, and of two for three ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 7), nn.Linear(7, 2)
    ).to(dtype)


def unit_rows(model: nn.Module, **settings: Any) -> AdamG:
    groups = param_groups(model, {"manifold": "grassmann", "view": "filter"}, linear="grassmann")
    return AdamG(groups, lr=0.05, **settings)


def pairs_of_rows(model: nn.Module, **settings: Any) -> PSISGD:
    """Vectors of two filters: shards of four filters leave them whole, shards of three do not."""
    pairs = {"params": [("0.weight", model[0].weight)], "manifold": "scale_invariant", "rows": 2}
    others = [(name, parameter) for name, parameter in model.named_parameters() if name != "0.weight"]
    return PSISGD([pairs, {"params": others}], lr=0.1, momentum=0.9, **settings)


#: Optimizers whose matrices shards cut, by what is particular about them.
GATHERED: dict[str, Any] = {
    "matrices": lambda model, **rest: FGSGD(
        param_groups(model, {"manifold": "stiefel", "view": "matrix"}, linear="stiefel"),
        lr=0.5,
        momentum=0.9,
        diagnostics=True,
        **rest,
    ),
    "pio": lambda model, **rest: FGSGD(
        partition(model, "pio", ["sphere", "oblique", None], seed=2), lr=0.5, diagnostics=True, **rest
    ),
    "rows": unit_rows,
    "pairs": pairs_of_rows,
    "masters": lambda model, **rest: FGSGD(
        param_groups(model.bfloat16(), None, linear={"manifold": "oblique"}),
        lr=torch.tensor(0.5),
        momentum=0.9,
        master_weights=True,
        diagnostics=True,
        **rest,
    ),
}

#: How weights are cut; norms and biases are cut along the only dimension that they have, or not at all.
CUTS = {"outputs": Shard(0), "inputs": Shard(1)}


def cut(model: nn.Module, optimizer: ManifoldOptimizer, how: str) -> nn.Module:
    """``model`` with ``DTensor`` parameters, made of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = CUTS[how] if parameter.dim() > 1 or how == "outputs" else Replicate()
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placed])))
    optimizer.rebind(model)
    return model


def given_steps(model: nn.Module, optimizer: ManifoldOptimizer, numbers: range) -> None:
    """Steps along given gradients; in the second of them the last matrix has none."""
    for number in numbers:
        for at, (parameter, grad) in enumerate(zip(model.parameters(), gradients(model, number), strict=True)):
            grad = grad.to(parameter.dtype)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = None if (number, at) == (1, 5) else grad
        optimizer.step()


def everything(model: nn.Module, optimizer: ManifoldOptimizer) -> list[Tensor]:
    """Weights and all that is kept beside them."""
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    kept = [whole(state[name]) for state in states for name in sorted(state)]
    counts = torch.tensor(optimizer.nonfinite_count())
    return [*(whole(parameter) for parameter in model.parameters()), *kept, counts]


def norms_of_matrices(optimizer: ManifoldOptimizer) -> Tensor:
    """R of the groups of weights on manifolds."""
    if not isinstance(optimizer, FGSGD):
        return torch.empty(0)
    found = optimizer.diagnostics()
    manifolds = [group["manifold"] for group in optimizer.param_groups for _ in group["params"]]
    return found.norm[[not isinstance(manifolds[at], Euclidean) for at in found.parameter.tolist()]].clone()


def gathered(name: str, how: str) -> dict[str, Any]:
    """Three steps of matrices that are cut."""
    model = layers()
    optimizer = GATHERED[name](model, cut_matrices="gather")
    cut(model, optimizer, how)
    given_steps(model, optimizer, range(3))
    found = {"states": everything(model, optimizer), "norms": norms_of_matrices(optimizer)}
    optimizer.check()
    return found


class UnderWay(TorchDispatchMode):
    """Counts gathering collectives: all, and those that nobody has waited for yet."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        starts = func.name().startswith("_c10d_functional::all_gather")
        self.started += starts
        self.now += starts - (func.name() == "_c10d_functional::wait_tensor")
        self.most = max(self.most, self.now)
        return func(*args, **(kwargs or {}))


def collectives_of_a_step() -> tuple[int, int]:
    """How many there are, and how many are under way at once."""
    model = layers()
    optimizer = GATHERED["matrices"](model, cut_matrices="gather")
    cut(model, optimizer, "inputs")
    given_steps(model, optimizer, range(1))
    with UnderWay() as counted:
        optimizer.step()
    return counted.started, counted.most


def gathered_training() -> list[Tensor]:
    """Forward, backward and step of a fully sharded model; every rank has the same batch, so that means are exact."""
    model = layers().eval()
    optimizer = GATHERED["matrices"](model, cut_matrices="gather")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer.rebind(model)
    train_layers(model, optimizer)
    return everything(model, optimizer)


def train_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 5, 5, 5, generator=torch.Generator().manual_seed(number))
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def gathered_around(how: str) -> dict[str, Any]:
    """What else writes matrices: an average put back on its manifolds, and other scales."""
    model = layers()
    optimizer = GATHERED["matrices"](model, cut_matrices="gather")
    cut(model, optimizer, how)
    return around(model, optimizer)


def around(model: nn.Module, optimizer: FGSGD) -> dict[str, Any]:
    average = AveragedModel(model)
    given_steps(model, optimizer, range(3))
    average.update_parameters(model)
    project_average_(average, optimizer)
    optimizer.rescale(model[0].weight, 0.5)
    optimizer.check()
    return {"average": [whole(p) for p in average.module.parameters()], "rescaled": whole(model[0].weight)}


def saved_gathered(folder: Path, save: bool) -> list[Tensor]:
    """Two steps, saved, and a third; or loaded, by another number of ranks, and a third."""
    out = []
    for name in ("matrices", "rows"):
        model = layers()
        optimizer = GATHERED[name](model, cut_matrices="gather")
        cut(model, optimizer, "inputs")
        if save:
            given_steps(model, optimizer, range(2))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        if save:
            dcp.save(state, checkpoint_id=str(folder / f"gathered-{name}"))
        else:
            dcp.load(state, checkpoint_id=str(folder / f"gathered-{name}"))
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        given_steps(model, optimizer, range(2, 3))
        out += everything(model, optimizer)
    return out


def gradients_cut_otherwise(rank: int) -> list[Tensor]:
    """A gradient that is a sum over ranks still to be taken, of a weight that all have and of one that is cut."""
    mesh = init_device_mesh("cpu", (WORLD,))
    found = []
    for placed in (Replicate(), Shard(0)):
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [placed]))
        optimizer = FGSGD([weight], lr=1.0)
        weight.grad = DTensor.from_local(torch.full((4, 3), 1.0 + rank), mesh, [Partial()])
        optimizer.step()
        found.append(whole(weight))
    return found


def average_of_whole_weights() -> str:
    """An average that has no shards, of a model that has."""
    model = layers()
    optimizer = GATHERED["matrices"](model, cut_matrices="gather")
    average = AveragedModel(model)
    cut(model, optimizer, "outputs")
    try:
        project_average_(average, optimizer)
    except ValueError as error:
        return str(error)
    return ""


def zero(rank: int) -> dict[str, list[Tensor]]:
    """Every rank steps some of the parameters and tells the others; saved after two steps, and loaded by optimizers
    that have not stepped yet and that have."""

    def made() -> tuple[nn.Module, ZeroRedundancyOptimizer]:
        model = network()
        groups = [
            {name: value for name, value in group.items() if name not in ("names", "param_names")}
            for group in param_groups(model, "stiefel")
        ]
        return model, ZeroRedundancyOptimizer(groups, optimizer_class=FGSGD, lr=0.5, momentum=0.9)

    def train(model: nn.Module, optimizer: ZeroRedundancyOptimizer, numbers: range) -> None:
        for number in numbers:
            for parameter, grad in zip(model.parameters(), gradients(model, number), strict=True):
                parameter.grad = grad
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()} if rank == 0 else None, file)
    files = [file.getvalue()]
    dist.broadcast_object_list(files)
    train(model, optimizer, range(2, 4))
    found = {"trained": [whole(parameter) for parameter in model.parameters()]}
    for name, before in (("resumed", 0), ("gone back", 2)):
        model, optimizer = made()
        train(model, optimizer, range(before))
        with torch.serialization.safe_globals([Euclidean, Stiefel]):  # torch's wrapper saves groups as they are
            saved = torch.load(io.BytesIO(files[0]), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(2, 4))
        found[name] = [whole(parameter) for parameter in model.parameters()]
    return found


def two(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "ddp": replicas(rank),
        **{name: shards_with_given_gradients(name) for name in ("layer", "pio")},
        "fsdp": fully_sharded(rank, folder),
        "rows": sharded_rows(folder),
        "cut": cut_matrices(),
        "gathered": {(name, how): gathered(name, how) for name in GATHERED for how in CUTS},
        "collectives": collectives_of_a_step(),
        "gathered training": gathered_training(),
        "whole average": average_of_whole_weights(),
        "gathered around": {how: gathered_around(how) for how in CUTS},
        "gathered, saved": saved_gathered(folder, save=True),
        "gradients": gradients_cut_otherwise(rank),
        "zero": zero(rank),
    }


def three(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "gathered": {(name, how): gathered(name, how) for name in ("matrices", "rows", "pairs") for how in CUTS},
        "gathered, saved": saved_gathered(folder, save=False),
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meeting-of-{world}'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    torch.save({2: two, 3: three}[world](rank, folder), folder / f"{rank}-of-{world}.pt")
    dist.barrier()  # nobody leaves while another may still be sending
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

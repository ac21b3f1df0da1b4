"""Parameters in shards (``DTensor``, ``fully_shard``): which components this rank holds, and norms over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.optim.operands import is_sharded, local
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, RULES, STEP_SIZES, Group, Plan
from manifold_kernels.reference.rules import step_size_factor
from manifold_kernels.views import Layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LR, _RHO, _CURVATURE = (HYPER_COLUMNS.index(name) for name in ("lr", "rho", "curvature"))


def whole(parameter: Tensor) -> Tensor:
    """A tensor of the shape of all shards of ``parameter``, without memory; an unsharded one is its own."""
    if is_sharded(parameter):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return parameter


def as_sharded(shard: Tensor, parameter: Tensor, gathered: bool = False) -> Tensor:
    """``shard``, of a tensor that is cut as ``parameter`` is, as ``DTensor``; as it is where the latter is not cut.

    One number a component is on every rank where components are ``gathered``.
    """
    if not is_sharded(parameter):
        return shard
    from torch.distributed.tensor import DTensor, Replicate

    of: DTensor = parameter  # type: ignore[assignment]
    if shard.dim() == parameter.dim():
        shape, stride = parameter.shape, parameter.stride()
    elif gathered:
        return DTensor.from_local(shard, of.device_mesh, [Replicate()] * of.device_mesh.ndim, run_check=False)
    else:  # one number a component: components are cut as the first dimension is
        rows = local(parameter).shape[0]
        count = shard.shape[0] * parameter.shape[0] // rows if rows else parameter.shape[0]
        shape, stride = torch.Size([count]), (1,)
    return DTensor.from_local(shard, of.device_mesh, of.placements, run_check=False, shape=shape, stride=stride)


def localized(groups: Sequence[Group], parameter: Tensor) -> list[Group]:
    """The rows of a plan over all of ``parameter``, with the components that this rank holds, by its own numbers.

    Every rank keeps every row, also one without a component of its own, so that norms can be summed row by row.

    Raises:
        ValueError: a sharding that cuts components.
    """
    layout = groups[0].layout
    if layout.view == "flat" or not _shards(parameter):
        return list(groups)
    if is_cut(parameter, layout):
        of: DTensor = parameter  # type: ignore[assignment]
        raise ValueError(
            f"view: {layout.view!r} has matrices over several ranks with the placements {of.placements} of a tensor of "
            f"shape {tuple(of.shape)}. Use a view whose matrices stay whole, 'kernel' or 'filter' with shards along "
            "dimension 0, as fully_shard makes them, or cut_matrices='gather', which steps whole matrices on every "
            "rank, or leave the weight unsharded or without a manifold."
        )
    own = _own_numbers(whole(parameter), layout, *_own_rows(parameter))
    out = []
    for group in groups:
        numbers = own if group.components is None else own[group.components]
        here = numbers >= 0
        scale = group.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            scale = scale.reshape(-1)[here]
        out.append(replace(group, components=None if group.components is None else numbers[here], scale=scale))
    return out


def is_cut(parameter: Tensor, layout: Layout) -> bool:
    """Whether matrices of ``parameter`` lie on several ranks, or in no order that a plan has. All ranks agree."""
    shards = _shards(parameter)
    if layout.view == "flat" or not shards:
        return False
    if len(shards) > 1 or not shards[0][1].is_shard(0):
        return True
    if layout.view == "kernel":
        return layout.channel_groups > 1
    return layout.view != "filter" or layout.out_dim != 0 or _length(parameter) % layout.rows != 0


def _shards(parameter: Tensor) -> list[tuple[int, Any]]:
    """The dimensions of the mesh over which ``parameter`` is cut, and how."""
    if not is_sharded(parameter):
        return []
    of: DTensor = parameter  # type: ignore[assignment]
    return [
        (dim, placed)
        for dim, placed in enumerate(of.placements)
        if not placed.is_replicate() and of.device_mesh.size(dim) > 1
    ]


def _length(parameter: Tensor) -> int:
    """The indices of dimension 0 that each rank has, but for the last ones: as ``torch.chunk`` cuts."""
    of: DTensor = parameter  # type: ignore[assignment]
    ((dim, _),) = _shards(parameter)
    return -(-of.shape[0] // of.device_mesh.size(dim))


def _own_rows(parameter: Tensor) -> tuple[int, int]:
    """First index and number of the indices that this rank has of dimension 0."""
    of: DTensor = parameter  # type: ignore[assignment]
    ((dim, _),) = _shards(parameter)
    start = min(of.device_mesh.get_local_rank(dim) * _length(parameter), of.shape[0])
    return start, min(_length(parameter), of.shape[0] - start)


def _own_numbers(parameter: Tensor, layout: Layout, start: int, size: int) -> Tensor:
    """For every component its number among those of the ``size`` indices from ``start`` of dimension 0, or -1."""
    shape = views.shape_of(parameter, layout)
    number = torch.arange(shape.count, device="cpu")
    if layout.out_dim == 0:
        rows = 1 if layout.view == "kernel" else layout.rows
        per_row = shape.inputs if layout.view == "kernel" else 1
        own = number - start // rows * per_row
        return torch.where((own >= 0) & (own < size // rows * per_row), own, -1)
    output, channel = number // shape.inputs, number % shape.inputs - start
    return torch.where((channel >= 0) & (channel < size), output * size + channel, -1)


class SharedNorms:
    """Step sizes of groups whose components lie on several ranks.

    R of such a group is measured by a step of copies of this rank's shards, summed over the ranks in one ``all_reduce``
    for all groups, and reaches the step as a learning rate: ``lr' = lr tau(R_here)/tau(R)``, which the step divides by
    ``tau(R_here)``.

    Attributes:
        plan: the plan in which each of these groups has a row of hyper-parameters of its own.
    """

    def __init__(
        self, plan: Plan, parameters: Sequence[Tensor], param_groups: int, gathered: Set[int] = frozenset()
    ) -> None:
        self._rows: dict[Any, list[int]] = {}  # by process group
        columns = {
            name: plan.column(name).tolist() for name in ("parameter", "rule", "step_size", "individual", "view")
        }
        for row, position in enumerate(columns["parameter"]):
            bounded = columns["rule"][row] == RULES["fg_sgd"] and columns["step_size"][row] == STEP_SIZES["general"]
            together = not columns["individual"][row] and columns["view"][row] != views.VIEWS["flat"]
            spread = position not in gathered and _shards(parameters[position])
            if bounded and together and spread:
                self._rows.setdefault(_ranks(parameters[position]), []).append(row)
        self._all = [row for rows in self._rows.values() for row in rows]
        self._parameters = {columns["parameter"][row] for row in self._all}
        lengths = torch.where(plan.column("individual") == 1, plan.column("count"), 1)
        self._size, self._at = int(lengths.sum()), (lengths.cumsum(0) - lengths)[self._all]
        self._hyper = plan.column("hyper")[self._all].clone()
        own = plan.groups.clone()
        own[self._all, GROUP_COLUMNS.index("hyper")] = param_groups + torch.arange(len(self._all), device="cpu")
        self.plan = Plan(own, plan.components, plan.scales)
        self._described = plan

    def __bool__(self) -> bool:
        return bool(self._all)

    def tables(
        self,
        operator: Callable[..., None],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        variances: Sequence[Tensor],
        steps: Tensor,
        nonfinite: Tensor,
        hyper: Tensor,
        live: Tensor | None,
        amp: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``hyper`` and ``live`` with a row for each of these groups, and R of them."""

        def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.clone() if at in self._parameters else tensor for at, tensor in enumerate(tensors)]

        norms = torch.empty(self._size, dtype=torch.float64, device="cpu")
        described = self._described
        operator(
            copies(weights),
            [grad if at in self._parameters else None for at, grad in enumerate(grads)],
            copies(momenta),
            copies(variances),
            steps.clone(),
            nonfinite.clone(),
            described.groups,
            described.components,
            described.scales,
            hyper,
            norms,
            *amp,
            live,
        )
        here = norms[self._at].nan_to_num(nan=0.0)
        r = self._summed(here, weights[0].device)
        numbers = (hyper if live is None else live.cpu())[self._hyper].clone()
        factors = [step_size_factor(each, numbers[:, _RHO], numbers[:, _CURVATURE]) for each in (here, r)]
        numbers[:, _LR] *= factors[0].clamp(max=1e300) / factors[1].clamp(max=1e300)
        if live is not None:
            live = torch.cat([live, numbers.to(live.device)])
        return torch.cat([hyper, hyper[self._hyper] if live is not None else numbers]), live, r

    def _summed(self, here: Tensor, device: torch.device) -> Tensor:
        square = here.square().to(device)
        first = 0
        for ranks, rows in self._rows.items():
            torch.distributed.all_reduce(square[first : first + len(rows)], group=ranks)
            first += len(rows)
        return square.sqrt().cpu()

    def write(self, norms: Tensor, r: Tensor) -> None:
        """R of these groups to their places in ``norms``."""
        stepped = ~norms[self._at].isnan()
        norms[self._at] = torch.where(stepped | (r > 0), r, norms[self._at])


def _ranks(parameter: Tensor) -> Any:
    """The process group over which ``parameter`` is cut."""
    of: DTensor = parameter  # type: ignore[assignment]
    ((dim, _),) = _shards(parameter)
    return of.device_mesh.get_group(dim)

"""Matrices that a sharding cuts: every rank puts them together, steps them whole, and keeps its shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_kernels.optim.operands import local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Lists = tuple[list[Tensor], list[Tensor | None], list[Tensor]]


@contextmanager
def opened(tensor: Tensor, gathered: bool) -> Iterator[Tensor]:
    """The matrices of ``tensor`` to be written: those on this rank, or all where they are ``gathered``.

    Of the latter this rank keeps its shard. All ranks have to come here.
    """
    if not gathered:
        yield local(tensor)
        return
    put_together = assembled(tensor)
    yield put_together
    _keep(put_together, local(tensor), tensor)


def assembled(tensor: Tensor) -> Tensor:
    """All of ``tensor``, a copy. All ranks have to come here."""
    ((put_together,),) = _together([[local(tensor)]], [tensor])
    return put_together


class Gathering:
    """The parameters whose matrices are put together for a step.

    Args:
        parameters: these parameters, by their positions.
    """

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        self._parameters = dict(parameters)

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def whole(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None], momenta: Sequence[Tensor]) -> Lists:
        """The lists with whole tensors for these parameters, by one ``all_gather`` for the three of each.

        A weight that has no gradient is not looked at: memory of its shape stands in its place.
        """
        lists: Lists = list(weights), list(grads), list(momenta)
        shards, stepped = [], []
        for at, parameter in self._parameters.items():
            weight, grad, momentum = weights[at], grads[at], momenta[at]
            buffered = momentum.dim() == weight.dim()
            if grad is not None:
                shards.append([weight, grad, momentum] if buffered else [weight, grad])
                stepped.append(at)
                continue
            lists[0][at] = weight.new_empty(parameter.shape)
            if buffered:
                lists[2][at] = momentum.new_empty(parameter.shape)
        together = _together(shards, [self._parameters[at] for at in stepped])
        for at, own in zip(stepped, together, strict=True):
            lists[0][at], lists[1][at] = own[:2]
            if own[2:]:
                lists[2][at] = own[2]
        return lists

    def keep(self, whole: Lists, weights: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
        """Write this rank's shards of what was stepped to ``weights`` and ``momenta``."""
        for at, parameter in self._parameters.items():
            if whole[1][at] is None:
                continue
            _keep(whole[0][at], weights[at], parameter)
            if momenta[at].dim() == weights[at].dim():
                _keep(whole[2][at], momenta[at], parameter)


def _together(shards: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each of ``parameters`` the whole of each of its ``shards``, which are cut as it is.

    Those of one parameter travel together. Parameters follow each other: torch's gloo corrupts the heap now and then
    where several collectives are under way.
    """
    from torch.distributed.tensor import DTensor, Replicate

    together = []
    for own, parameter in zip(shards, parameters, strict=True):
        of: DTensor = parameter  # type: ignore[assignment]
        shape = torch.Size([*of.shape, len(own)])  # the last dimension, so that placements stay what they are
        stride = torch.empty(shape, device="meta").stride()
        stacked = DTensor.from_local(
            torch.stack(list(own), -1), of.device_mesh, of.placements, run_check=False, shape=shape, stride=stride
        )
        everywhere = [Replicate()] * of.device_mesh.ndim
        whole = stacked.redistribute(placements=everywhere).to_local()
        together.append([each.contiguous() for each in whole.unbind(-1)])
    return together


def _keep(whole: Tensor, shard: Tensor, parameter: Tensor) -> None:
    """Write to ``shard`` this rank's part of ``whole``, cut as ``parameter`` is. Talks to nobody."""
    from torch.distributed.tensor import DTensor, Replicate

    of: DTensor = parameter  # type: ignore[assignment]
    everywhere = DTensor.from_local(whole, of.device_mesh, [Replicate()] * of.device_mesh.ndim, run_check=False)
    shard.copy_(everywhere.redistribute(placements=of.placements).to_local())

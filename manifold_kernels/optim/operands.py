"""What the operator steps for each parameter: the parameter, its shard on this rank, or a float32 master of either."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_SHORT = (torch.bfloat16, torch.float16)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which this rank has a shard."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one without it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The shard of ``tensor`` on this rank, sharing its memory, or ``tensor`` itself."""
    if is_sharded(tensor):
        with torch.no_grad():
            shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
            return shard
    return tensor


def wants_master(parameter: Tensor, master_weights: bool) -> bool:
    """Whether ``parameter`` is stepped through a float32 master."""
    return master_weights and parameter.dtype in _SHORT


def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the shape, strides and device of ``tensor``, also where those are not dense."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)


def _cut_alike(grad: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of ``grad``, cut as ``parameter`` is; a sum over ranks that was left open is taken."""
    if is_sharded(grad) and grad.placements != parameter.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(grad)


class Operands:
    """The weights that the operator writes, and the way there and back.

    Args:
        parameters: the optimizer's parameters.
        masters: the float32 master of a parameter, by its position, where it has one.

    Parameters are held, not their memory: ``parameter.data`` may be replaced, by ``model.to(...)`` for example.
    """

    def __init__(self, parameters: Sequence[Tensor], masters: dict[int, Tensor]) -> None:
        self._masters = [(position, parameters[position], master) for position, master in masters.items()]
        self._sharded = [(position, each) for position, each in enumerate(parameters) if is_sharded(each)]
        self._held = [masters.get(position, parameter) for position, parameter in enumerate(parameters)]

    def weights(self, frozen: Sequence[int] = ()) -> list[Tensor]:
        """What the operator writes by position: parameter, shard or master; copies of those that are to stay."""
        held = [local(each) for each in self._held] if self._sharded else self._held
        return [each.clone() if at in frozen else each for at, each in enumerate(held)] if frozen else held

    def gradients(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """``grads`` as the operator takes them: shards as they lie, those of masters in float32."""
        if not self._sharded and not self._masters:
            return grads
        grads = list(grads)
        for position, parameter in self._sharded:
            grad = grads[position]
            grads[position] = None if grad is None else _cut_alike(grad, parameter)
        for position, _, _ in self._masters:
            grad = grads[position]
            grads[position] = None if grad is None else grad.float()
        return grads

    def store(self, grads: Sequence[Tensor | None], found_inf: Tensor | None) -> None:
        """Round the masters that were stepped to their weights, unless ``found_inf`` says that nothing was."""
        for position, parameter, master in self._masters:
            if grads[position] is None:
                continue
            weight = local(parameter)
            if found_inf is None:
                weight.copy_(master)
            else:
                weight.copy_(torch.where(found_inf.reshape(()) != 0, weight, master.to(weight.dtype)))

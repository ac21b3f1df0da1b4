"""Learning-rate schedules for which the convergence theorem of [FG] holds."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class RobbinsMonroLR(LRScheduler):
    """``r_t = r_0/(1 + t/t_0)^alpha``, 1/2 < alpha <= 1, with ``sum r_t = inf`` and ``sum r_t^2 < inf`` ([FG] Eq. 4).

    Stochastic gradients leave weights in a noise that is as large as the steps. The conditions, those of Robbins &
    Monro (1951), let the noise die out without stopping the weights on their way; [FG] Theorem 2 assumes them. A rate
    that falls by a constant factor every so many epochs violates the first, a constant one the second.

    ``t`` counts calls of :meth:`step`: one after every epoch, or one after every step of the optimizer, where ``t0`` is
    larger by as many steps as an epoch has. Every param group starts from its own ``lr``. As torch's schedulers do, it
    multiplies the current rate, so that ``SequentialLR`` and ``ChainedScheduler`` may combine it with a warm-up. A rate
    in a float32 tensor is rounded by every call and stands still after some ten million; a Python float goes on.

    Args:
        optimizer: whose learning rates are scheduled.
        t0: > 0; at ``t = t0`` the rate has fallen by ``2^alpha``, before that it changes little.
        alpha: in (1/2, 1]; the smaller, the slower the decay.
        last_epoch: as in torch.

    Raises:
        ValueError: ``t0`` or ``alpha`` outside of these ranges.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.6)
    >>> scheduler = RobbinsMonroLR(optimizer, t0=2)
    >>> for _ in range(4):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 12)  # 0.6/(1 + 4/2)
    0.2
    """

    def __init__(self, optimizer: Optimizer, t0: float, alpha: float = 1.0, last_epoch: int = -1) -> None:
        if not 0 < t0 < math.inf:
            raise ValueError(f"t0: wanted a finite number > 0, after which the rate is r_0/2^alpha, got {t0!r}.")
        if not 0.5 < alpha <= 1:
            raise ValueError(
                f"alpha: wanted a number in (1/2, 1], got {alpha!r}. Up to 1/2 the squares of the rates have no finite "
                "sum and the noise stays; above 1 the rates have one and weights stop on their way ([FG] Eq. 4)."
            )
        self.t0 = t0
        self.alpha = alpha
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates at ``last_epoch`` from those of the call before; :meth:`get_last_lr` tells the current ones."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self._is_initial:  # at the start, or where training resumes: nothing has been stepped since
            return rates
        now = self.t0 + self.last_epoch
        return [rate * ((now - 1) / now) ** self.alpha for rate in rates]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [rate * (1 + self.last_epoch / self.t0) ** -self.alpha for rate in self.base_lrs]

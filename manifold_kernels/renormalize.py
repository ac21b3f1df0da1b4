"""Renormalisation of weights ([FG] section IV): the scale of a component from its layer's sizes and its features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manifold_kernels.layers import LAYERS, layout
from manifold_kernels.manifolds import MANIFOLDS, _Scaled
from manifold_kernels.optim import FGSGD
from manifold_kernels.views import Layout, Shape, shape_of

VERSION = 1
_SCALED = {of.code for of in MANIFOLDS if issubclass(of, _Scaled)}


class Renormalizer:
    """Gives every component with a scale in ``optimizer`` the scale of [FG] section IV and moves its weights there::

        s = gamma/lambda,    gamma = (b + b')^(-1/2)        [FG] Eq. 2

    ``b`` is the number of weights into one output neuron (inputs per channel group times kernel area), ``b'`` that of
    output neurons (positions of an output map times output channels; for linear layers the outputs alone).
    ``lambda >= 1`` is the standard deviation of the features entering the component, 1 at the first renormalisation.
    Components in ``kernel`` and ``filter`` views then have Frobenius, spectral and 2->1 norms <= 1 ([FG] Proposition 1;
    :func:`~manifold_kernels.norms.weight_norms` measures them).

    Map sizes and deviations are seen by forward hooks on the layers. A layer that is called with maps of several sizes
    counts with the largest seen so far, in training, evaluation or :meth:`trace`. The variance of every input channel,
    over batch and positions, is averaged as batch norm does it, ``v <- (1 - momentum) v + momentum v_batch`` from
    ``v = 1`` at every call in training mode (calls with one value a channel tell nothing and are passed over), and
    ``lambda = max(1, sqrt(v))`` of each channel. A kernel has that of its input. A filter or a matrix, which reads many
    channels, has the root mean square of theirs: for uncorrelated channels, weights of even size pass on as much
    variance as if every channel had that deviation. Behind batch norm and ReLU the deviation is about 0.58 and lambda
    is 1 anyway: ``statistics=False`` saves measuring it.

    Outputs shrink with the scales, to a variance of 1e-3 and less. Batch norm takes that out again in training mode,
    but its running variance, which starts at 1, needs some hundred steps to forget it: evaluate after that. The length
    of a step counts against the scale, so that learning rates are smaller: in a small network on digits 0.1 trains as 1
    does at the fan scale, and 0.4 is too large.

    Call :meth:`step` before training, after a :meth:`trace`, and at every epoch; ``every`` does the latter by itself.
    Momentum buffers stay as they are. Deviations are those of this process: where several train one model, all but one
    have to take over its :meth:`state_dict` before a step.

    Args:
        model: its convolutions and linear layers are found by the identity of their weights.
        optimizer: an :class:`~manifold_kernels.optim.FGSGD` with components that have a scale; collections too.
        momentum: weight of the newest batch in the average, in (0, 1].
        statistics: False keeps lambda = 1.
        every: renormalise after every so many steps of the optimizer since the last time, until :meth:`close`.

    Raises:
        TypeError: another optimizer.
        ValueError: a setting out of range; no component has a scale; a weight with a scale is not that of a convolution
            or linear layer of ``model``, or is read otherwise by the optimizer than by its layer.

    >>> from manifold_kernels import param_groups
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    >>> optimizer = FGSGD(param_groups(model, "sphere"), lr=0.1, momentum=0.9, backend="reference")
    >>> with Renormalizer(model, optimizer, every=100) as renormalizer:
    ...     renormalizer.trace(torch.randn(1, 3, 4, 4))
    ...     renormalizer.step()
    ...     # ... train ...
    >>> round(model[0].weight[0, 0].norm().item(), 6)  # (3 * 9 + 16 * 8) ** -0.5
    0.080322
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FGSGD,
        *,
        momentum: float = 0.1,
        statistics: bool = True,
        every: int | None = None,
    ) -> None:
        if not isinstance(optimizer, FGSGD):
            raise TypeError(f"optimizer: wanted an FGSGD, whose weights have scales, got {type(optimizer).__name__}.")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: wanted a number in (0, 1], got {momentum!r}.")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every: wanted a whole number of steps >= 1 or None, got {every!r}.")
        self._model, self._optimizer, self._every = model, optimizer, every
        self._calls = self._since = 0
        self._weights = _weights(model, optimizer, momentum if statistics else None)
        self._handles: list[RemovableHandle] = []
        watched = {id(each.weight): each.seen for each in self._weights.values()}
        for module in model.modules():
            if isinstance(module, LAYERS) and (seen := watched.get(id(_weight(module)))):
                self._handles.append(module.register_forward_hook(seen.look, with_kwargs=True))
        if every is not None:
            self._handles.append(optimizer.register_step_post_hook(self._count))

    def trace(self, *inputs: Any) -> None:
        """Run ``model(*inputs)`` once, in eval mode and without gradient, to record the sizes of maps and nothing else.

        Modes and the state of random numbers are afterwards as they were.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad(), torch.random.fork_rng():
                self._model(*inputs)
        finally:
            for module, mode in modes:
                module.training = mode

    def scales(self) -> dict[str, Tensor]:
        """The scales that :meth:`step` would set now: weight name -> float64 ``(components,)``.

        Raises:
            RuntimeError: a layer has not been called yet, or its features were not finite.
        """
        unseen = [name for name, each in self._weights.items() if not each.seen.positions]
        if unseen:
            raise RuntimeError(
                f"Renormalizer: wanted a forward pass through every layer with a scale, got none through {unseen}. Run "
                "the model once, or trace(*inputs), before step(). Leave a layer that the model never calls without a "
                "manifold: rules={name: None} in param_groups."
            )
        wrong = [name for name, each in self._weights.items() if not bool(each.seen.variance.isfinite().all())]
        if wrong:
            raise RuntimeError(
                f"Renormalizer: wanted finite features, got NaN, Inf or numbers whose squares overflow into {wrong}. "
                "Nothing was moved. Go back to a checkpoint, with a smaller learning rate."
            )
        return {name: each.scales(first=self._calls == 0) for name, each in self._weights.items()}

    def step(self) -> None:
        """Renormalise: set all scales anew and move the weights along (``optimizer.rescale``).

        The first call has lambda = 1. Raises what :meth:`scales` does; nothing is written then.
        """
        for name, scales in self.scales().items():
            self._optimizer.rescale(self._weights[name].weight, scales)
        self._calls += 1
        self._since = 0

    def deviations(self) -> dict[str, Tensor]:
        """The measured deviation of every input channel, not yet bounded by 1: weight name -> ``(channels,)``."""
        return {name: each.seen.variance.sqrt() for name, each in self._weights.items()}

    def _count(self, *_: Any) -> None:
        self._since += 1
        if self._every is not None and self._since >= self._every:
            self.step()

    def close(self) -> None:
        """Remove all hooks. What was seen stays, so that :meth:`step` still works."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Renormalizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as numbers and copies of tensors; the scales are in the optimizer's state."""
        return {
            "version": VERSION,
            "calls": self._calls,
            "since": self._since,
            "weights": {
                name: {"positions": each.seen.positions, "variance": each.seen.variance.clone()}
                for name, each in self._weights.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, so that training goes on with the same bits; tensors are copied.

        Load the model and the optimizer, too.

        Raises:
            ValueError: naming the first thing that does not fit; nothing was taken over then.
        """
        for entry in ("version", "calls", "since", "weights"):
            if entry not in state_dict:
                raise ValueError(f"state_dict: {entry!r} is missing. Wanted one from Renormalizer.state_dict().")
        if state_dict["version"] != VERSION:
            raise ValueError(f"state_dict: wanted version {VERSION}, got {state_dict['version']!r}.")
        for entry in ("calls", "since"):
            _check_count(f"state_dict: {entry}", state_dict[entry])
        saved = state_dict["weights"]
        if saved.keys() != self._weights.keys():
            differing = sorted(saved.keys() ^ self._weights.keys())
            raise ValueError(f"state_dict: wanted the weights {list(self._weights)}, differs in {differing}.")
        for name, each in self._weights.items():
            variance = saved[name]["variance"]
            _check_count(f"state_dict: positions of {name}", saved[name]["positions"])
            if variance.shape != each.seen.variance.shape or variance.dtype != each.seen.variance.dtype:
                raise ValueError(
                    f"state_dict: wanted the variance of {name} as {each.seen.variance.dtype} "
                    f"{tuple(each.seen.variance.shape)}, got {variance.dtype} {tuple(variance.shape)}."
                )
        for name, each in self._weights.items():
            each.seen.positions = saved[name]["positions"]
            each.seen.variance.copy_(saved[name]["variance"])
        self._calls, self._since = state_dict["calls"], state_dict["since"]


@dataclass
class _Seen:
    """What forward passes have told about one weight.

    It knows neither model nor optimizer: a deep copy of the model, which copies hooks, copies this and nothing more.

    Attributes:
        spatial: the number of dimensions of a map, 0 for linear layers.
        momentum: of the average, or ``None`` for no statistics.
        variance: ``(channels,)``, the average.
        positions: the most positions of an output map so far, 0 before the first.
    """

    spatial: int
    momentum: float | None
    variance: Tensor
    positions: int = 0

    @torch.no_grad()
    def look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook, for ``register_forward_hook(..., with_kwargs=True)``."""
        self.positions = max(self.positions, math.prod(output.shape[output.dim() - self.spatial :]))
        if self.momentum is None or not layer.training:
            return
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        self.variance = self.variance.to(x.device)
        channels = self.variance.numel()
        if not self.spatial:
            x = x.reshape(-1, channels)
        elif x.dim() == self.spatial + 1:
            x = x.unsqueeze(0)
        if x.numel() > channels:
            # The first half of F.batch_norm, in one or two reads of x and without an output.
            mean = torch.zeros_like(self.variance)
            torch.batch_norm_update_stats(x.to(mean.dtype), mean, self.variance, self.momentum)


@dataclass(frozen=True)
class _Weight:
    """A weight with scales: how the optimizer and its layer read it, and what was seen of it."""

    weight: Tensor
    layout: Layout
    shape: Shape
    groups: int
    seen: _Seen

    def scales(self, first: bool) -> Tensor:
        """gamma/lambda of every component; lambda = 1 at the ``first`` time."""
        inputs, outputs = self.shape.inputs, self.shape.outputs
        fan_in = inputs * math.prod(self.weight.shape[2:])
        gamma = 1 / math.sqrt(fan_in + self.seen.positions * outputs)
        if first:
            return torch.full((self.shape.count,), gamma, dtype=torch.float64, device="cpu")
        deviation = self.seen.variance.double().cpu().sqrt().clamp(min=1)
        # The inputs of every output, (outputs, inputs): those of its channel group.
        entering = deviation.reshape(self.groups, 1, inputs).expand(-1, outputs // self.groups, -1).flatten(0, 1)
        if self.layout.view == "kernel":
            return gamma / entering.flatten()
        return gamma / entering.reshape(self.shape.count, -1).square().mean(1).sqrt()


def _weights(model: nn.Module, optimizer: FGSGD, momentum: float | None) -> dict[str, _Weight]:
    """Every weight of ``model`` with scales in ``optimizer``, by name."""
    plan = optimizer.plan
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    positions = plan.column("parameter").tolist()
    layouts = {
        positions[row]: plan.layout(row)
        for row, code in enumerate(plan.column("manifold").tolist())
        if code in _SCALED and parameters[positions[row]].numel()
    }
    if not layouts:
        raise ValueError(
            "optimizer: wanted weights on spheres, oblique or Stiefel manifolds, got none: nothing to renormalise. "
            "manifold_kernels.param_groups puts weights on manifolds."
        )
    of = {id(parameters[position]): at for position, at in layouts.items()}
    found: dict[int, tuple[str, _Weight]] = {}
    for owner, layer in model.named_modules():
        weight = _weight(layer)
        if not isinstance(layer, LAYERS) or weight is None or id(weight) not in of:
            continue
        name = f"{owner}.weight" if owner else "weight"
        read = of[id(weight)]
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        wanted = layout(layer, read.view, read.rows)
        if read != wanted:
            raise ValueError(
                f"{name}: its layer {type(layer).__name__} wants transposed={bool(wanted.out_dim)} and "
                f"channel_groups={wanted.channel_groups}, got {bool(read.out_dim)} and {read.channel_groups} in the "
                "optimizer. Set them in the param group, or let manifold_kernels.param_groups make it."
            )
        if id(weight) in found:
            if found[id(weight)][1].groups != groups:
                raise ValueError(
                    f"{name}: is shared with {found[id(weight)][0]}, wanted as many channel groups there, "
                    f"{found[id(weight)][1].groups}, got {groups}. Leave it without a manifold."
                )
            continue
        shape = shape_of(weight, read)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        variance = torch.ones(shape.inputs * groups, dtype=dtype, device=weight.device)
        seen = _Seen(weight.dim() - 2, momentum, variance)
        found[id(weight)] = name, _Weight(weight, read, shape, groups, seen)
    names = optimizer.parameter_names()
    missing = [names[position] for position in layouts if id(parameters[position]) not in found]
    if missing:
        raise ValueError(
            f"optimizer: wanted every weight with a scale to belong to a convolution or linear layer of model, got "
            f"{missing}. Pass the model that the optimizer was made for, or leave these weights without a manifold."
        )
    return dict(found.values())


def _weight(layer: nn.Module) -> nn.Parameter | None:
    """The weight of ``layer`` where it is a parameter, not computed by a parametrization."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: wanted a whole number >= 0, got {value!r}.")

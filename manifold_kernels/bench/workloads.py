"""What is stepped: layers whose weights a method puts on its manifold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from manifold_kernels.bench import networks
from manifold_kernels.bench.networks import conv

#: Typical gradients. Weights must stay as they are over thousands of steps along the same one: see ``methods.LR``.
_GRADIENT = 1e-3


@dataclass(frozen=True)
class Workload:
    """Weights that are stepped together.

    Attributes:
        name: what tables and filters call it.
        layers: makes the layers. Convolutions lie on the manifold, by kernels where these are matrices and else by
            filters; PSI and Grassmann take filters. Norm parameters are Euclidean.
        methods: shell-style patterns of the names of methods that are worth a line.
        linear: whether linear layers lie on the manifold, too.
        view: how constrained weights are read, where it is not the layer's default.
        peers: patterns of the names of peers that are timed on it.
        dtype: of weights, gradients and momenta.
        memory_format: of the weights of convolutions.
        against: the workload on which the same method is the yardstick; ``None``: fused SGD on this one.
        device: where weights, gradients and states lie, ``"cpu"`` or ``"cuda"``.
    """

    name: str
    layers: Callable[[], nn.Module]
    methods: tuple[str, ...]
    linear: bool = False
    view: str | None = None
    peers: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    against: Workload | None = None
    device: str = "cpu"

    def on(self, device: str) -> Workload:
        """The same on ``device``."""
        against = None if self.against is None else self.against.on(device)
        return replace(self, device=device, against=against)

    def model(self) -> nn.Module:
        """The layers with weights and gradients, the same at every call and on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.layers().to(dtype=self.dtype)
            for weight in model.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.contiguous(memory_format=self.memory_format)
                weight.grad = torch.randn_like(weight) * _GRADIENT
        return model.to(self.device)

    def elements(self) -> int:
        """The number of weights."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.layers().parameters())


def _conv(name: str, methods: Sequence[str], *shape: int, peers: tuple[str, ...] = ()) -> Workload:
    """One convolution of ``shape`` (outputs, inputs, height, width)."""
    outputs, inputs, *kernel = shape
    layers = partial(conv, inputs, outputs, *kernel)
    return Workload(name, layers, tuple(methods), peers=peers)


_ALL = ("*",)
_UNCOMPILED = ("geoopt *", "eager *", "SGD, *")  # a compiler takes minutes for a network of many small layers
_PRODUCTS = ("sphere*", "oblique*", "stiefel*")
_ROWS = ("PSI-SGD", "PSI-SGDM", "SGD-G", "Adam-G")
SERIES_METHODS = ("euclidean", "sphere", "oblique", "stiefel")
_CONV3 = ("euclidean", *_PRODUCTS, *_ROWS)

_CONV_256 = _conv("conv 256x256x3x3", _CONV3, 256, 256, 3, 3, peers=_ALL)
_CONV_1024 = _conv("conv 1024x1024x3x3", _CONV3, 1024, 1024, 3, 3, peers=_ALL)
_LINEAR = ("sphere", "oblique", "stiefel", "stiefel [a-z]*")  # one component is one layer


def _variant(of: Workload, name: str, **changes: object) -> Workload:
    """``of`` in another dtype or layout, measured against ``of`` itself."""
    changed = {"methods": (*_PRODUCTS, "PSI-SGDM"), "peers": (), **changes}
    return replace(of, name=f"{of.name} {name}", against=of, **changed)  # type: ignore[arg-type]


WORKLOADS: tuple[Workload, ...] = (
    _conv("conv 32x32x3x3", SERIES_METHODS, 32, 32, 3, 3),
    _conv("conv 128x128x3x3", SERIES_METHODS, 128, 128, 3, 3),
    _conv("conv 512x512x3x3", SERIES_METHODS, 512, 512, 3, 3),
    _conv("conv 64x64x3x3", _CONV3, 64, 64, 3, 3, peers=_ALL),
    _CONV_256,
    _CONV_1024,
    _conv("conv 256x256x5x5", _PRODUCTS, 256, 256, 5, 5),
    _conv("conv 256x256x7x7", _PRODUCTS, 256, 256, 7, 7),
    Workload("ResNet-18 convolutions", networks.resnet18, (*_CONV3, "PIO"), peers=_ALL),
    Workload("ResNet-50 convolutions", networks.resnet50, ("euclidean", *_PRODUCTS, "PSI-SGDM")),
    Workload("ResNet-20", networks.resnet20, (*_CONV3, "PIO"), peers=_UNCOMPILED),
    Workload(
        "rows 512x4608",
        partial(nn.Linear, 4608, 512, bias=False),
        ("euclidean", "sphere*", *_ROWS),
        linear=True,
        view="filter",
        peers=_ALL,
    ),
    _conv("512 matrices 64x32", ("sphere*", "oblique*", "stiefel*"), 512, 1, 64, 32, peers=_ALL),
    Workload("linear 512x512", partial(nn.Linear, 512, 512, bias=False), _LINEAR, True, peers=_ALL),
    Workload("linear 1024x256", partial(nn.Linear, 1024, 256, bias=False), _LINEAR, True, peers=_ALL),
    _variant(_CONV_256, "bfloat16", dtype=torch.bfloat16),
    _variant(_CONV_1024, "bfloat16", dtype=torch.bfloat16),
    _variant(_CONV_256, "channels_last", memory_format=torch.channels_last),
    _variant(_CONV_1024, "channels_last", memory_format=torch.channels_last),
)

#: Square convolutions of 3x3 in float32, whose throughput with ``SERIES_METHODS`` is drawn against their size.
SERIES = tuple(of.name for of in WORKLOADS if of.name.startswith("conv") and of.name.endswith("3x3"))

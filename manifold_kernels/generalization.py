"""The three expressions of [FG] Table I for generalisation errors, from the norms that the weights have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_kernels.layers import LAYERS, layout, outputs
from manifold_kernels.norms import matrix_norms, weight_norms
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.views import matrices


@dataclass(frozen=True)
class GeneralizationBounds:
    """**Natural logarithms** of the expressions in [FG] Table I; products over thousands of groups leave float64.

    What stands inside O and O-tilde, no more: they compare trainings of one architecture on one data set, and are not
    bounds on an error by themselves. With layers l = 1..L, their groups g, norms F (Frobenius), S (spectral) and
    T (2->1), N samples and width w::

        neyshabur2015 = log( 2^L prod_l prod_g F / sqrt(N) )
        bartlett2017  = log( prod_l prod_g S / sqrt(N) (sum_l prod_g (T/S)^(2/3))^(3/2) )
        neyshabur2018 = log( prod_l prod_g S / sqrt(N) (L^2 w sum_l prod_g (F/S)^2)^(1/2) )

    Attributes:
        neyshabur2015: Neyshabur, Tomioka & Srebro, [FG] reference [22]. O hides the largest norm of an input, the
            margin or Lipschitz constant of the loss, and the confidence.
        bartlett2017: Bartlett, Foster & Telgarsky, reference [3]. O-tilde hides the norm of the data, one over the
            margin, the Lipschitz constants of the activations, the logarithm of the width and the confidence.
        neyshabur2018: Neyshabur, Bhojanapalli & Srebro, reference [8]. O-tilde hides the largest norm of an input, one
            over the margin, the root of the logarithm of L w, and the confidence.
        layers: L.
        samples: N.
        width: w.
    """

    neyshabur2015: float
    bartlett2017: float
    neyshabur2018: float
    layers: int
    samples: int
    width: int


def generalization_bounds(
    model: nn.Module, optimizer: ManifoldOptimizer, *, samples: int, width: int | None = None
) -> GeneralizationBounds:
    """The expressions of [FG] Table I for ``model``, from the norms its groups have now.

    Layers are all convolutions and linear layers, registered twice counts twice. The groups of a weight are those of
    ``optimizer.plan``, components side by side (:func:`~manifold_kernels.norms.weight_norms`); a weight that lies on no
    manifold, in the optimizer or not, is one group, its ``matrix`` view ``(C A B) x D``. Biases and the parameters of
    normalisations do not count, as in the paper.

    [FG] puts the product over a layer's groups where the cited theorems have the norm of the layer. That product is no
    upper bound of the layer's norm (ten groups of norm 1/2 give 1e-3), so that values of different groupings, the
    number of groups above all, do not compare.

    Args:
        model: the network.
        optimizer: an optimizer of its weights.
        samples: N, the number of training samples.
        width: the width of the layers, by default the largest number of output channels.

    Raises:
        ValueError: a number out of range; a model without such layers; a group of norm 0 or not finite, by layer.

    >>> from manifold_kernels.optim import FGSGD
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> optimizer = FGSGD(model.parameters(), lr=0.1, manifold="stiefel", backend="reference")
    >>> round(math.exp(generalization_bounds(model, optimizer, samples=100).neyshabur2015), 6)  # 2 sqrt(2)/10
    0.282843
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    measured: dict[int, list[Tensor]] = {}
    for found in weight_norms(optimizer):
        measured.setdefault(id(parameters[found.parameter]), []).append(found.groups)
    layers: dict[str, Tensor] = {}
    widths = [0]
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LAYERS):
            weight = layer.weight
            groups = measured.get(id(weight))
            layers[name] = torch.cat(groups) if groups else matrix_norms(matrices(weight, layout(layer, "matrix")))
            widths.append(outputs(layer))
    if not layers:
        raise ValueError("model: wanted convolutions or linear layers, got none.")
    for name, norms in layers.items():
        if not bool((norms.isfinite() & (norms > 0)).all()):
            raise ValueError(f"model: wanted finite norms > 0, got others in a group of layer {name!r}.")
    return table1(list(layers.values()), samples=samples, width=max(widths) if width is None else width)


def table1(layers: Sequence[Tensor], *, samples: int, width: int) -> GeneralizationBounds:
    """The same from the norms themselves.

    Args:
        layers: for each layer the Frobenius, spectral and 2->1 norms of its groups, ``(groups, 3)`` or ``(3,)``, > 0.
        samples: N.
        width: w.

    >>> round(table1([torch.tensor([1.0, 1.0, 1.0])] * 2, samples=100, width=1).neyshabur2015, 6)  # log(4/10)
    -0.916291
    """
    for name, value in (("samples", samples), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: wanted a whole number >= 1, got {value!r}.")
    if not layers:
        raise ValueError("layers: wanted the norms of one layer or more, got none.")
    logs = torch.stack([norms.detach().double().cpu().reshape(-1, 3).log().sum(0) for norms in layers])
    frobenius, spectral, two_to_one = logs.unbind(1)
    depth = len(layers)
    per_sample = -0.5 * math.log(samples)
    product = float(spectral.sum()) + per_sample
    bartlett = 1.5 * float(torch.logsumexp((two_to_one - spectral) * (2 / 3), 0))
    neyshabur = 0.5 * (math.log(depth**2 * width) + float(torch.logsumexp((frobenius - spectral) * 2, 0)))
    return GeneralizationBounds(
        neyshabur2015=depth * math.log(2) + float(frobenius.sum()) + per_sample,
        bartlett2017=product + bartlett,
        neyshabur2018=product + neyshabur,
        layers=depth,
        samples=samples,
        width=width,
    )

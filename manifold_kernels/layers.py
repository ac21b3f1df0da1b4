"""The layers whose weights are matrices by themselves: convolutions and linear layers."""

from __future__ import annotations

from torch import nn

from manifold_kernels.views import Layout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)


def outputs(layer: nn.Module) -> int:
    """The number of output neurons of a convolution or linear layer."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def layout(owner: nn.Module, view: str, rows: int = 1) -> Layout:
    """The layout of the weight of ``owner``; transposed convolutions swap outputs and inputs, others need nothing."""
    if isinstance(owner, CONVOLUTIONS) and owner.transposed:
        return Layout(view, out_dim=1, channel_groups=owner.groups, rows=rows)
    return Layout(view, rows=rows)

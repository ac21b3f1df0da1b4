"""What 16-bit weights lose, with and without float32 masters: ``python bench/low_precision.py``.

Kernels on the Stiefel manifold go to the nearest points to a random target, along exact gradients rounded to the
weights' type, with a learning rate that is small against the rounding. Printed are how far the weights are off the
manifold, and how far from the target's nearest point, beside a float32 training.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from manifold_kernels import FGSGD, functional
from manifold_kernels.views import Layout

KERNEL = Layout("kernel")


def train(dtype: torch.dtype, masters: bool, steps: int, lr: float) -> tuple[Tensor, float, str]:
    """The weights at the end, their violation, and that of the masters."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 64, 3, 3, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    functional.project_weight_("stiefel", weight, KERNEL)
    parameter = nn.Parameter(weight.to(dtype))
    group = {"params": [parameter], "manifold": "stiefel", "view": "kernel"}
    optimizer = FGSGD([group], lr=lr, momentum=0.9, step_size="none", master_weights=masters)
    for _ in range(steps):
        parameter.grad = (parameter.detach().float() - target).to(dtype)
        optimizer.step()
    master = optimizer.state[parameter].get("master")
    of_master = "" if master is None else f"{functional.weight_violation('stiefel', master, KERNEL):.1e}"
    return parameter.detach().double(), optimizer.violation(), of_master


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    table = Table(
        "weights", "violation", "of masters", "off float32", title=f"{options.steps} steps, lr {options.lr:g}"
    )
    wanted, violation, _ = train(torch.float32, False, options.steps, options.lr)
    table.add_row("float32", f"{violation:.1e}", "", "")
    for dtype in (torch.bfloat16, torch.float16):
        for masters in (False, True):
            weights, violation, of_master = train(dtype, masters, options.steps, options.lr)
            off = float((weights - wanted).square().mean().sqrt())
            name = str(dtype).removeprefix("torch.") + (", masters" if masters else "")
            table.add_row(name, f"{violation:.1e}", of_master, f"{off:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()

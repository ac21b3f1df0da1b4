"""Accelerate: the prepared optimizer is a wrapper; the constraint holds all the same. Needs `accelerate`."""

import torch
from accelerate import Accelerator
from torch import nn

from manifold_kernels import FGSGD, param_groups


def main() -> tuple[list[float], float]:
    """Losses of all steps, and the largest violation of a constraint at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32)
    optimizer = FGSGD(param_groups(model, "stiefel", euclidean={"lr": 0.1}), lr=1.0, momentum=0.9)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, prepared, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(20):
        for batch, target in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
                prepared.step()
                prepared.zero_grad()
            losses.append(loss.item())
    violation = optimizer.violation()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, violation {violation:.1e}")
    return losses, violation


if __name__ == "__main__":
    main()

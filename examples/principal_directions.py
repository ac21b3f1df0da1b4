"""Principal directions of data as an optimisation over orthonormal matrices, compared with the eigenvectors."""

import torch

from manifold_kernels import FGSGD, functional


def main(steps: int = 200) -> float:
    torch.manual_seed(0)
    data = torch.randn(500, 20, dtype=torch.float64) * torch.linspace(3, 1, 20, dtype=torch.float64)
    covariance = data.T @ data / len(data)

    # Rows are outputs, so that W (5 x 20) has orthonormal rows: W Wᵀ = I.
    weight = functional.projx("stiefel", torch.randn(5, 20, dtype=torch.float64)).requires_grad_()
    optimizer = FGSGD([{"params": [weight], "manifold": "stiefel", "retraction": "qr"}], lr=0.2, step_size="none")
    for step in range(steps):
        optimizer.zero_grad()
        loss = -torch.trace(weight @ covariance @ weight.T) / 2
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1:3d}  explained variance {-2 * loss.item():.6f}")

    eigenvectors = torch.linalg.eigh(covariance).eigenvectors[:, -5:]
    angles = torch.linalg.svdvals(weight.detach() @ eigenvectors)
    print(f"cosines of the angles between the two subspaces: {angles.tolist()}")
    return float(angles.min())


if __name__ == "__main__":
    main()

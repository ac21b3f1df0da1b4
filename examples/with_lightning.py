"""Lightning: orthonormal kernels in a LightningModule, with gradient clipping and a schedule. Needs `lightning`."""

import tempfile

import lightning
import torch
from torch import Tensor, nn

from manifold_kernels import FGSGD, RobbinsMonroLR, param_groups


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        groups = param_groups(self.net, "stiefel", euclidean={"lr": 0.1})
        optimizer = FGSGD(groups, lr=1.0, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": RobbinsMonroLR(optimizer, t0=20, alpha=0.6)}


def main() -> tuple[list[float], float]:
    """Losses of all steps, and the largest violation of a constraint at the end."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32)
    model = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=10,
            accelerator="cpu",
            gradient_clip_val=5.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, data)
    violation = trainer.optimizers[0].violation()
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}, violation {violation:.1e}")
    return model.losses, violation


if __name__ == "__main__":
    main()

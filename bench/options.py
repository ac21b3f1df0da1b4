"""What the experiments have in common on the command line: images, network, methods, threads."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from manifold_kernels.demo import data
from manifold_kernels.demo.data import Images


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from ``least`` on."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number >= {least}, got {text}")
        return int(text)

    return whole_number


def parser(description: str | None, output: Path) -> argparse.ArgumentParser:
    """A parser with the common arguments."""
    of = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    of.add_argument("--data", choices=list(data.SETS), default="digits")
    of.add_argument("--train-images", type=at_least(1), help="how many; all by default")
    of.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="such as 'PSI*' or 'PIO *'")
    of.add_argument("--blocks", type=at_least(1), default=3, help="in each of three stages; 3: ResNet-20, 9: ResNet-56")
    of.add_argument("--width", type=at_least(1), default=8, help="channels of the first stage; [PSI]: 16, [FG]: 24")
    of.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    of.add_argument("--output", type=Path, default=output, help="the folder for results")
    return of


def images(options: argparse.Namespace) -> Images:
    """The images that are asked for."""
    found = data.SETS[options.data]()
    return found if options.train_images is None else found.first(options.train_images)


def network(options: argparse.Namespace) -> str:
    """The network in words."""
    return f"ResNet-{6 * options.blocks + 2} of width {options.width}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

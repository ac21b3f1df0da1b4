"""What all tests share: the same random numbers every time, and no test that depends on how fast the machine is."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Fails where torch can use no GPU: ``python tests/gpu_there.py TARGET``."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"make {sys.argv[1]}: wanted an NVIDIA GPU that torch {torch.__version__} can use, got none.")
print(torch.cuda.get_device_name())

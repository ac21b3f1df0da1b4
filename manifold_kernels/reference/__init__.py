"""The reference backend: every operator in plain PyTorch, any dtype, to be read beside the formulas."""

from manifold_kernels.reference.step import step_

__all__ = ["step_"]

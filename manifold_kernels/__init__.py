"""Fused Riemannian optimizers for neural-network weights under geometric constraints."""

from manifold_kernels import functional, manifolds
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG
from manifold_kernels.routing import param_groups

__version__ = "0.1.0"

__all__ = ["FGSGD", "PSISGD", "SGDG", "AdamG", "__version__", "functional", "manifolds", "param_groups"]

"""Optimizers for weights on manifolds: ``torch.optim.Optimizer`` to the letter, one operator call a step."""

from manifold_kernels.optim import pure
from manifold_kernels.optim.adamg import AdamG
from manifold_kernels.optim.averaging import project_average_
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.optim.fgsgd import FGSGD
from manifold_kernels.optim.psisgd import PSISGD
from manifold_kernels.optim.schedule import RobbinsMonroLR
from manifold_kernels.optim.sgdg import SGDG

__all__ = ["FGSGD", "PSISGD", "SGDG", "AdamG", "ManifoldOptimizer", "RobbinsMonroLR", "project_average_", "pure"]

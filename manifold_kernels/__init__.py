"""Fused Riemannian optimizers for neural-network weights under geometric constraints."""

from manifold_kernels import functional, manifolds
from manifold_kernels.collection import Assignment, Collection
from manifold_kernels.norm_detection import find_scale_invariant, verify_scale_invariant
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG, RobbinsMonroLR
from manifold_kernels.renormalize import Renormalizer
from manifold_kernels.routing import param_groups, partition
from manifold_kernels.routing_table import print_routing_table, routing_table

__version__ = "0.1.0"

__all__ = [
    "FGSGD",
    "PSISGD",
    "SGDG",
    "AdamG",
    "Assignment",
    "Collection",
    "Renormalizer",
    "RobbinsMonroLR",
    "__version__",
    "find_scale_invariant",
    "functional",
    "manifolds",
    "param_groups",
    "partition",
    "print_routing_table",
    "routing_table",
    "verify_scale_invariant",
]

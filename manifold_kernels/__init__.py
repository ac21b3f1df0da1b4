"""Fused Riemannian optimizers for neural-network weights under geometric constraints."""

"""The Triton backend: the same operator for GPUs without a compiler, NVIDIA's and AMD's; on the CPU by its interpreter."""

from manifold_kernels.triton.support import INTERPRETED

if INTERPRETED:
    from manifold_kernels.triton import interpreter

    interpreter.teach()

from manifold_kernels.triton.launch import step_, warm_up

__all__ = ["step_", "warm_up"]

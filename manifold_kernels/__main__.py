"""``python -m manifold_kernels``: the same as the command ``manifold-kernels``."""

from manifold_kernels.cli import app

app(prog_name="manifold-kernels")

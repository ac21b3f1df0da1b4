"""The command line: ``manifold-kernels info | validate | bench | train``; commands draw what engines compute."""

import typer

from manifold_kernels.cli import bench, info, train, validate

app = typer.Typer(
    help="Fused Riemannian optimizers for neural-network weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info.info)
app.command()(validate.validate)
app.command()(bench.bench)
app.command()(train.train)

__all__ = ["app"]

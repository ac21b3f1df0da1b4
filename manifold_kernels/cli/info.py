"""``manifold-kernels info``."""

from rich.console import Console
from rich.table import Table

from manifold_kernels import info as facts


def info() -> None:
    """What is installed, with what it was built, and which backends can be used here."""
    console = Console()
    for title, rows in (
        ("machine", facts.machine()),
        ("compiled extension", facts.build() or {"": "not there: pure Python"}),
        ("backends", facts.backends()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)

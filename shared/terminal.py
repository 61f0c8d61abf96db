"""How every command looks: progress bars on standard error, tables on standard output. Nothing is drawn in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# In a pipe lines are not folded, whatever their length.
PIPE_COLUMNS = 1000


def bars() -> Progress:
    """Progress bars; each task has a `note`, the words beside its bar. Drawn on a terminal only."""
    console = Console(stderr=True)
    return Progress(
        # Not markup: descriptions are file names, and those may look like it.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


def sparkline(values: Sequence[float], columns: int = 48) -> str:
    """A curve in one line of text; of more values than `columns` every so-manieth is shown, the last one always."""
    shown = [values[round(at * (len(values) - 1) / max(1, columns - 1))] for at in range(columns)]
    shown = list(values) if len(values) <= columns else shown
    low, high = min(shown), max(shown)
    steps = "▁▂▃▄▅▆▇█"
    return "".join(steps[round((value - low) / ((high - low) or 1) * (len(steps) - 1))] for value in shown)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as what is in them."""
    table = Table(*header, box=None, header_style="bold", show_header=any(header), pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())

"""What a person sees of a run: small bars and tables, with rich where it is installed."""

import sys
from collections.abc import Sequence

from ..progress import rich_if_installed

EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(fraction: float, width: int = 4) -> str:
    """A small text bar; a fraction that is not 0 never looks like 0."""
    eighths = max(round(fraction * width * 8), fraction > 0)
    partial = EIGHTHS[eighths % 8] if eighths % 8 else ""
    text = ("█" * (eighths // 8) + partial).ljust(width, "·")
    if _can_print(text):
        return text
    return ("#" * round(fraction * width)).ljust(width, ".")


def arrow() -> str:
    return "→" if _can_print("→") else "->"


def change(form: str, *values: float) -> str:
    return f" {arrow()} ".join(f"{value:{form}}" for value in values)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    rich = rich_if_installed() if sys.stdout.isatty() else None
    if rich is None:
        _print_plain_table(title, columns, rows)
        return
    table = rich.table.Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    rich.console.Console(markup=False, highlight=False).print(table)


def _print_plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

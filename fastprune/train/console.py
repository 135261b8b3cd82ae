"""What a person sees of a run: progress bars and tables, with rich where it is installed."""

import sys
from collections.abc import Sequence
from time import perf_counter
from types import ModuleType, TracebackType

EIGHTHS = " ▏▎▍▌▋▊▉"


def _rich() -> ModuleType | None:
    try:
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        return None
    return rich


class Progress:
    """A bar on a terminal, one line at the end elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._note = ""
        rich = _rich() if sys.stdout.isatty() else None
        self._bar = rich and rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            "{task.fields[note]}",
        )

    def __enter__(self) -> "Progress":
        self._start = perf_counter()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, note="")
        return self

    def advance(self, note: str) -> None:
        self._note = note
        if self._bar:
            self._bar.update(self._task, advance=1, note=note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            seconds = perf_counter() - self._start
            print(f"{self._title}: {self._total} epochs, {self._note}, {seconds:.1f} s")


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


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    rich = _rich() if sys.stdout.isatty() else None
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

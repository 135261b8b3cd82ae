"""Progress bars, with rich where it is installed."""

import sys
from time import perf_counter
from types import ModuleType, TracebackType


def rich_if_installed() -> ModuleType | None:
    try:
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        return None
    return rich


class Progress:
    """A bar on a terminal; elsewhere one line at the end, of `total` things called `unit`.

    Without a unit nothing is printed where there is no terminal.
    """

    def __init__(self, title: str, total: int, unit: str = "", shown: bool = True) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._note = ""
        rich = rich_if_installed() if shown and sys.stdout.isatty() else None
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

    def advance(self, note: str = "") -> None:
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
        elif kind is None and self._unit:
            seconds = perf_counter() - self._start
            print(f"{self._title}: {self._total} {self._unit}, {self._note}, {seconds:.1f} s")

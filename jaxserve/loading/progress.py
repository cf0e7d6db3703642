"""Progress of loading: a callback of bytes goes in, a bar on the terminal comes out, or nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), called after every tensor and once before the first


def no_progress(done: int, total: int) -> None:
    """For callers that show nothing."""


@contextmanager
def progress_bar(title: str, show: bool | None = None) -> Iterator[Progress]:
    """A bar with bytes, rate and time left on standard error; `show` None = only if that is a terminal."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def count_bar(title: str, show: bool | None = None) -> Iterator[Progress]:
    """The same for things that are counted, not measured in bytes."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)

"""Progress of start-up: a callback of (done, in all) goes in, a bar on the terminal comes out, or nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # (done, in all), called after every piece and once before the first


def no_progress(done: int, total: int) -> None:
    """For callers that show nothing."""


@contextmanager
def progress_bar(title: str, show: bool | None = None, *, count_bytes: bool = True) -> Iterator[Progress]:
    """A bar on standard error, with time left; `show` None = only if that is a terminal.

    count_bytes  True: bytes and their rate; False: things, and the time they took
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield no_progress
        return
    from rich import progress as bars
    from rich.console import Console

    if count_bytes:
        amount: tuple[bars.ProgressColumn, ...] = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    else:
        amount = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *amount, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

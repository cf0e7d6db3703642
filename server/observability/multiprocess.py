"""The directory through which several front ends share their metrics: made by the supervisor, read at every scrape.

prometheus_client decides when it is imported, so the variable must be in the environment a front end starts with.
"""

import os
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def shared_directory() -> Path | None:
    """Where this process shares its metrics; None = it keeps them to itself."""
    path = os.environ.get(VARIABLE)
    return None if path is None else Path(path)


def share_environment(directory: Path) -> dict[str, str]:
    """What to add to the environment of front ends that share `directory`, which is made and emptied.

    Files of an earlier server would count as ours.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("*.db"):
        file.unlink()
    return {VARIABLE: str(directory)}


def front_end_died(directory: Path, pid: int) -> None:
    """Drops the gauges of a process that is gone. Its counters stay: what it counted did happen."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid, str(directory))

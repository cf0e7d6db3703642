"""A tqdm bar over requests, with output tokens per second, in terminals and notebooks."""

import sys
import time
import warnings


class RequestProgress:
    """A context manager; shows nothing where nobody watches (no terminal and no notebook)."""

    def __init__(self, total: int, show: bool):
        self._bar = None
        if show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a notebook without ipywidgets gets a bar of text
                from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc="requests", unit="request")
        self._start = time.perf_counter()
        self._tokens = 0

    def __enter__(self) -> "RequestProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, tokens: int, finished: bool) -> None:
        if self._bar is None:
            return
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(finished)

"""Which implementation of an op runs, and on what: static, chosen once at start-up by `dispatch.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A file of an op's folder, and how to run it.

    name        reference | triton | mosaic
    device      kind of the device as JAX names it ("NVIDIA H200"): what tuned configurations are looked up by
    num_cores   streaming multiprocessors of the device; how finely work is split when nothing was tuned
    interpret   run a kernel as plain JAX, on any device: slow, for tests
    """

    name: str
    device: str = ""
    num_cores: int = 132
    interpret: bool = False


REFERENCE = Backend("reference")

"""The memory plan: weights + slot state + largest step + KV pool against the device's budget, before any is loaded.

The largest step's temporaries are not estimated: that step is compiled and XLA says what it needs.
"""

from dataclasses import dataclass

from rich.table import Table

from jaxserve.config import CacheOptions
from jaxserve.errors import MemoryPlanError
from jaxserve.runner.device import DeviceMemory

CPU_POOL_BYTES = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes go. Rendered by `table()`."""

    model: str
    device: str
    dtype: str
    total_bytes: int
    budget_bytes: int
    weight_bytes: int
    slot_bytes: int
    step_bytes: int
    page_bytes: int  # of all layers, keys and values
    num_pages: int  # the waste page included
    page_size: int
    max_num_seqs: int
    max_model_len: int
    model_context: int  # what the model was trained for

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.weight_bytes + self.slot_bytes + self.step_bytes + self.pool_bytes

    @property
    def pool_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def pages_per_sequence(self) -> int:
        """Pages of a sequence of max_model_len tokens."""
        return -(-self.max_model_len // self.page_size)

    @property
    def full_sequences(self) -> float:
        """Sequences of max_model_len tokens the pool holds at once."""
        return (self.num_pages - 1) / self.pages_per_sequence

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(title=f"Memory plan: {self.model} in {self.dtype} on {self.device}", title_justify="left")
        table.add_column("what")
        table.add_column("size", justify="right")
        table.add_column("detail", style="dim")
        table.add_row("weights", size(self.weight_bytes), "")
        table.add_row("slot state", size(self.slot_bytes), f"{self.max_num_seqs} sequences at once")
        table.add_row("largest step", size(self.step_bytes), "temporaries, as compiled")
        table.add_row(
            "KV pool",
            size(self.pool_bytes),
            f"{self.num_pages - 1:,} pages of {self.page_size} = {self.pool_tokens:,} tokens",
        )
        context = f"max_model_len={self.max_model_len:,}"
        if self.max_model_len < self.model_context:
            context += f" (the model knows {self.model_context:,})"
        table.add_row("", "", f"{self.full_sequences:.1f} sequences of {context}")
        table.add_section()
        table.add_row("total", size(self.used_bytes), f"of {size(self.budget_bytes)} granted")
        return table


def pool_pages(cache: CacheOptions, memory: DeviceMemory, *, platform: str, page_bytes: int, other_bytes: int) -> int:
    """Pages of the pool, the waste page included: as configured, else 1 GiB on CPU, else what the budget leaves."""
    if cache.num_pages is not None:
        return cache.num_pages
    if cache.kv_cache_memory_bytes is not None:
        pages = cache.kv_cache_memory_bytes // page_bytes
        if pages < 2:
            raise MemoryPlanError(
                f"kv_cache_memory_bytes={cache.kv_cache_memory_bytes} holds {pages} pages of {page_bytes} bytes; at "
                "least 2 are needed: raise kv_cache_memory_bytes"
            )
        return pages
    if platform == "cpu":
        return max(2, CPU_POOL_BYTES // page_bytes)
    return max(2, (memory.budget - other_bytes) // page_bytes)


def addressable_pages(pages: int, page_elements: int, itemsize: int) -> int:
    """`pages`, or the most below that Triton addresses; page_elements: of one array, all layers.

    Into an array of one-byte elements its offsets are 32 bits up to 4 GiB, and signed: from 2 GiB on they would wrap.
    """
    elements = pages * page_elements
    return 2**31 // page_elements if itemsize == 1 and 2**31 < elements <= 2**32 else pages


def check_fits(plan: MemoryPlan) -> None:
    """Raises MemoryPlanError, with the numbers and the setting to change, for a plan that cannot work."""
    fixed = plan.weight_bytes + plan.slot_bytes + plan.step_bytes
    if plan.used_bytes > plan.budget_bytes:
        advice = (
            "lower kv_cache_memory_bytes or num_pages"
            if fixed + 2 * plan.page_bytes <= plan.budget_bytes
            else "take a smaller model or dtype, lower max_num_batched_tokens or max_num_seqs, raise memory_utilization"
        )
        raise MemoryPlanError(
            f"{plan.model} needs {size(plan.used_bytes)} (weights {size(plan.weight_bytes)}, slot state "
            f"{size(plan.slot_bytes)}, largest step {size(plan.step_bytes)}, KV pool {size(plan.pool_bytes)}) but "
            f"{size(plan.budget_bytes)} of {plan.device} are granted: {advice}"
        )
    needed = plan.pages_per_sequence
    if plan.num_pages - 1 < needed:
        raise MemoryPlanError(
            f"the KV pool of {plan.num_pages - 1} pages ({plan.pool_tokens} tokens) cannot hold one sequence of "
            f"max_model_len={plan.max_model_len} ({needed} pages, {size(needed * plan.page_bytes)}): raise "
            "kv_cache_memory_bytes, num_pages or memory_utilization, or lower max_model_len"
        )


def size(count: int) -> str:
    """Bytes for people: 1.5 GiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if round(amount, 1) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"

"""What the engine has done so far, for people and for metrics. Imports no JAX: front ends read these too."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.engine.core import EngineCore

# Upper bounds of the histogram of tokens a step; one more bucket follows for all beyond.
STEP_TOKEN_BOUNDS = tuple(1 << i for i in range(15))


@dataclass
class StepCounters:
    """Totals since the start; written by the core alone."""

    steps: int = 0
    rows: int = 0  # over all steps
    prompt_tokens: int = 0  # of accepted requests
    computed_tokens: int = 0  # over all steps, recomputation included
    generated_tokens: int = 0
    peak_pages_used: int = 0
    device_failures: int = 0
    plan_seconds: float = 0.0
    update_seconds: float = 0.0
    step_token_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))

    def count_step(self, num_rows: int, num_tokens: int, pages_used: int) -> None:
        self.steps += 1
        self.rows += num_rows
        self.computed_tokens += num_tokens
        self.step_token_buckets[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        self.peak_pages_used = max(self.peak_pages_used, pages_used)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the start, and gauges of this moment."""

    running: int
    waiting: int
    max_num_seqs: int
    steps: int
    prompt_tokens: int  # of accepted requests
    computed_tokens: int  # that went through the model, recomputation included
    generated_tokens: int
    preemptions: int
    mean_rows: float  # rows a step
    mean_batch_occupancy: float  # rows a step / max_num_seqs
    page_size: int
    pages_total: int
    pages_used: int  # held by sequences
    pages_cached: int  # held by the prefix cache alone
    peak_pages_used: int
    prefix_query_tokens: int  # looked up in the prefix cache
    prefix_hit_tokens: int  # and found
    prefix_cache_hit_rate: float  # the share
    step_token_buckets: tuple[int, ...]  # steps by their tokens: up to STEP_TOKEN_BOUNDS[i], then all beyond
    device_failures: int


def engine_stats(core: "EngineCore") -> EngineStats:
    """Safe to call from any thread; numbers may be one step apart."""
    counters, scheduler, dimensions = core.counters, core.scheduler.stats(), core.runner.dimensions
    mean_rows = counters.rows / counters.steps if counters.steps else 0.0
    queries = scheduler.prefix_query_tokens
    return EngineStats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        max_num_seqs=dimensions.max_num_seqs,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        computed_tokens=counters.computed_tokens,
        generated_tokens=counters.generated_tokens,
        preemptions=scheduler.num_preemptions,
        mean_rows=mean_rows,
        mean_batch_occupancy=mean_rows / dimensions.max_num_seqs,
        page_size=dimensions.page_size,
        pages_total=dimensions.num_pages - 1,
        pages_used=scheduler.pages_used,
        pages_cached=scheduler.pages_evictable,
        peak_pages_used=counters.peak_pages_used,
        prefix_query_tokens=queries,
        prefix_hit_tokens=scheduler.prefix_hit_tokens,
        prefix_cache_hit_rate=scheduler.prefix_hit_tokens / queries if queries else 0.0,
        step_token_buckets=tuple(counters.step_token_buckets),
        device_failures=counters.device_failures,
    )

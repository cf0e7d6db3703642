"""What the engine has done so far, for people and for metrics."""

from dataclasses import dataclass

from jaxserve.engine.core import EngineCore


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the start, and gauges of this moment."""

    running: int
    waiting: int
    steps: int
    prompt_tokens: int  # of accepted requests
    computed_tokens: int  # that went through the model, recomputation included
    generated_tokens: int
    preemptions: int
    mean_rows: float  # rows a step
    mean_batch_occupancy: float  # rows a step / max_num_seqs
    pages_total: int
    pages_used: int  # held by sequences
    pages_cached: int  # held by the prefix cache alone
    peak_pages_used: int
    prefix_cache_hit_rate: float  # cached share of the prompt tokens looked up
    device_failures: int


def engine_stats(core: EngineCore) -> EngineStats:
    """Safe to call from any thread; numbers may be one step apart."""
    counters, scheduler = core.counters, core.scheduler.stats()
    mean_rows = counters.rows / counters.steps if counters.steps else 0.0
    queries = scheduler.prefix_query_tokens
    return EngineStats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        computed_tokens=counters.computed_tokens,
        generated_tokens=counters.generated_tokens,
        preemptions=scheduler.num_preemptions,
        mean_rows=mean_rows,
        mean_batch_occupancy=mean_rows / core.runner.dimensions.max_num_seqs,
        pages_total=core.runner.dimensions.num_pages - 1,
        pages_used=scheduler.pages_used,
        pages_cached=scheduler.pages_evictable,
        peak_pages_used=counters.peak_pages_used,
        prefix_cache_hit_rate=scheduler.prefix_hit_tokens / queries if queries else 0.0,
        device_failures=counters.device_failures,
    )

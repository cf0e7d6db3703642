"""Every metric family of /metrics in one table: name (without prefix), type, meaning, further labels, buckets.

Names and meanings are vLLM's where it has the metric, so its dashboards and autoscalers can read ours under its prefix;
buckets are our own. Counters are named without the `_total` that the exposition adds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from server.errors import CODES
from server.frontend.engine_client import Phase

COMMON_LABELS = ("model_name", "engine")  # on every series; engine is always "0"
FINISHED_REASONS = ("stop", "length", "abort", "error")
PHASES: tuple[str, ...] = get_args(Phase)
# Refused for the moment's sake (queue full, draining, loading), not for the request's.
ADMISSION_CODES = tuple(code for code, told in CODES.items() if told.http in (429, 503))


@dataclass(frozen=True)
class Family:
    """label: one beyond COMMON_LABELS. All its `values` have series from the start, so rates see the first event."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def ladder(mantissas: Iterable[float], low: float, high: float) -> tuple[float, ...]:
    """Bucket bounds low..high: every mantissa times every power of ten. Exact decimals, so labels print short."""
    bounds = {float(f"{m}e{exponent}") for exponent in range(-6, 10) for m in mantissas}
    return tuple(sorted(bound for bound in bounds if low <= bound <= high))


SECONDS = ladder((1, 2.5, 5), 0.001, 2500)  # how long a phase of a request takes
GAPS = ladder((1, 1.5, 2, 3, 5, 7), 0.001, 10)  # between two tokens of a sample
TOKENS = ladder((1, 2, 5), 1, 1e6)
COUNTS = (1, 2, 5, 10, 20, 50, 100)

# Counted by the front ends, request by request.
REQUEST_FAMILIES = (
    Family(
        "prompt_tokens", "counter", "Prompt tokens whose prefill is done, those found in the prefix cache included."
    ),
    Family("prompt_tokens_cached", "counter", "Of prompt_tokens, those found in the prefix cache."),
    Family("generation_tokens", "counter", "Generated tokens."),
    Family("request_success", "counter", "Ended samples by how they ended.", "finished_reason", FINISHED_REASONS),
    Family("admission_rejections", "counter", "Calls refused for the moment's sake.", "reason", ADMISSION_CODES),
    Family("errors", "counter", "Calls refused and requests cut short or failed, by error code.", "code", tuple(CODES)),
    Family("open_requests", "gauge", "Accepted requests that have not ended, waiting ones included."),
    Family("time_to_first_token_seconds", "histogram", "Arrival to first token.", buckets=SECONDS),
    Family("inter_token_latency_seconds", "histogram", "Gap between two tokens of a sample.", buckets=GAPS),
    Family(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean gap between the tokens of a request after its first.",
        buckets=GAPS,
    ),
    Family("e2e_request_latency_seconds", "histogram", "Arrival to last token.", buckets=SECONDS),
    Family("request_queue_time_seconds", "histogram", "Arrival to first scheduled.", buckets=SECONDS),
    Family("request_inference_time_seconds", "histogram", "First scheduled to last token.", buckets=SECONDS),
    Family("request_prefill_time_seconds", "histogram", "First scheduled to first token.", buckets=SECONDS),
    Family("request_decode_time_seconds", "histogram", "First token to last token.", buckets=SECONDS),
    Family("request_prompt_tokens", "histogram", "Prompt tokens of a request.", buckets=TOKENS),
    Family("request_generation_tokens", "histogram", "Generated tokens of a request, all samples.", buckets=TOKENS),
    Family(
        "request_max_num_generation_tokens",
        "histogram",
        "Generated tokens of the longest sample of a request.",
        buckets=TOKENS,
    ),
    Family("request_params_n", "histogram", "The parameter n (samples asked for).", buckets=COUNTS),
    Family("request_params_max_tokens", "histogram", "The parameter max_tokens, where given.", buckets=TOKENS),
    Family("request_num_preemptions", "histogram", "Times a request was preempted.", buckets=(0, *COUNTS)),
    Family(
        "request_prefill_kv_computed_tokens",
        "histogram",
        "Prompt tokens computed for a request, those found in the prefix cache excluded.",
        buckets=(0, *TOKENS),
    ),
)

# Read from what the engine last said of itself.
ENGINE_FAMILIES = (
    Family("num_requests_running", "gauge", "Samples that hold a slot."),
    Family("num_requests_waiting", "gauge", "Samples that wait for a slot."),
    Family("num_slots", "gauge", "Slots: samples that can run at a time."),
    Family("kv_cache_usage_perc", "gauge", "Share of KV pages that sequences hold; 1 = all."),
    Family(
        "prefix_cache_usage_perc", "gauge", "Share of KV pages that the prefix cache alone holds, free to be reused."
    ),
    Family("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    Family("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    Family("num_preemptions", "counter", "Samples that lost their pages to others and start over."),
    Family("iteration_tokens_total", "histogram", "Tokens computed by a step."),
    Family("engine_device_failures", "counter", "Steps that a device error lost."),
    Family("engine_restarts", "counter", "Times the engine process was started anew after it died or hung."),
    Family("engine_up", "gauge", "1 = the engine says that it is ready."),
    Family("engine_phase", "gauge", "1 for the phase the engine is in, 0 for the others.", "phase", PHASES),
    Family("engine_heartbeat_age_seconds", "gauge", "Time since the engine process last said anything."),
    Family("engine_step_age_seconds", "gauge", "Time the step in progress has taken; 0 = none is in progress."),
    Family("server_ready", "gauge", "1 = this front end would answer 200 to /health/ready."),
    Family("cache_config_info", "gauge", "Always 1; the sizes of the KV pool and of the engine are its labels."),
)
CACHE_CONFIG_LABELS = (
    "block_size",
    "num_gpu_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "dtype",
)
FAMILIES = REQUEST_FAMILIES + ENGINE_FAMILIES

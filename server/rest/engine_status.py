"""What the engine is doing right now, for the playground: `GET /v1/engine/status`.

In: what this front end last heard of the engine. Out: gauges, counters and limits, with None for what is not known yet
(while the engine loads). Nothing here names a client, a request or a text. Metrics are for machines: see /metrics.
"""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.errors import ServiceError
from server.frontend.engine_client import Phase
from server.frontend.frontend import Frontend
from server.rest.call import frontend_of
from server.rest.types_misc import error_responses

router = APIRouter()


class SamplingDefaults(BaseModel):
    """What a request that names none of these is decoded with."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


class EngineStatusResponse(BaseModel):
    """tokens/s = the difference of two answers' `generated_tokens` over that of their `at`."""

    object: Literal["engine.status"] = "engine.status"
    model: str
    phase: Phase
    detail: str  # of the phase, for people
    draining: bool
    # Gauges
    at: float  # seconds on the engine's clock, whose zero means nothing: when these were true
    running: int | None = None  # sequences in the batch
    waiting: int | None = None
    pages_used: int | None = None  # held by sequences
    pages_cached: int | None = None  # held by the prefix cache alone
    # Counters since the engine started
    generated_tokens: int | None = None
    prefix_cache_hit_rate: float | None = None  # cached share of the prompt tokens looked up
    # What was settled at the start
    max_num_seqs: int | None = None
    pages_total: int | None = None
    page_size: int | None = None  # tokens
    max_model_len: int | None = None  # tokens
    max_logprobs: int | None = None
    device: str | None = None
    dtype: str | None = None
    defaults: SamplingDefaults | None = None
    grpc_port: int | None = None


@router.get("/v1/engine/status", responses=error_responses(401, 500))
async def engine_status(request: Request) -> EngineStatusResponse:
    """Answers in every phase, a dead engine included."""
    frontend = frontend_of(request)
    status, info = frontend.engine.status, frontend.engine.info
    answer = EngineStatusResponse(
        model=frontend.model_names[0],
        phase=status.phase,
        detail=status.detail,
        draining=frontend.draining,
        at=status.heard,
        defaults=_defaults(frontend),
        grpc_port=getattr(request.app.state, "grpc_port", None),
    )
    if info is not None:
        answer.max_num_seqs = info.limits.max_num_seqs
        answer.pages_total = info.limits.num_pages - 1  # one is the waste page
        answer.page_size = info.limits.page_size
        answer.max_model_len = info.limits.max_model_len
        answer.max_logprobs = info.max_logprobs
        answer.device = info.device
        answer.dtype = info.dtype
    if (stats := status.stats) is not None:
        answer.running = stats.running
        answer.waiting = stats.waiting
        answer.pages_used = stats.pages_used
        answer.pages_cached = stats.pages_cached
        answer.generated_tokens = stats.generated_tokens
        answer.prefix_cache_hit_rate = stats.prefix_cache_hit_rate
    return answer


def _defaults(frontend: Frontend) -> SamplingDefaults | None:
    try:
        params = frontend.text.default_sampling_params()
    except ServiceError:  # not ready yet
        return None
    return SamplingDefaults.model_validate(params, from_attributes=True)

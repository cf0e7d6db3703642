"""Requests that an observer sees from begin to end, without an engine or a tokenizer behind them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from jaxserve.engine.assembler import RequestAssembler
from jaxserve.engine.stats import STEP_TOKEN_BOUNDS, EngineStats
from jaxserve.request import Request, SamplingParams, TokenOutput
from jaxserve.scheduling.limits import Limits
from jaxserve.text.tokenizer import Tokenizer
from server.frontend.engine_client import EngineInfo, EngineStatus
from server.observability.metrics import ServerMetrics
from server.settings import ServerSettings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Call:
    endpoint: str = "/v1/completions"
    client_request_id: str = "client-1"
    traceparent: str | None = None


@dataclass
class Driver:
    """Feeds an observer as a front end would; instants are seconds after `start`."""

    metrics: ServerMetrics
    start: float = field(default_factory=time.monotonic)
    made: int = 0

    def begin(self, prompt_tokens: int = 10, call: Call | None = None, **params: Any) -> RequestAssembler:
        """A request that arrived at 0. No text: nothing asks for a tokenizer."""
        self.made += 1
        request = Request(
            id=f"gen-{self.made}",
            prompt_token_ids=list(range(prompt_tokens)),
            params=SamplingParams(detokenize=False, **params),
            arrival_time=self.start,
        )
        self.metrics.begin(request.id, call or Call())
        return RequestAssembler(request, None, cast(Tokenizer, None))

    def tokens(
        self,
        assembler: RequestAssembler,
        at: float,
        count: int = 1,
        index: int = 0,
        finish_reason: Any = None,
        scheduled: float = 0.25,
        cached: int = 0,
        preemptions: int = 0,
    ) -> None:
        now = self.start + at
        output = TokenOutput(
            request_id=assembler.request.id,
            index=index,
            token_ids=[7] * count,
            finish_reason=finish_reason,
            cached_tokens=cached,
            preemptions=preemptions,
            scheduled_time=self.start + scheduled,
        )
        delta, _ = assembler.feed(output, now)
        assert delta is not None
        self.metrics.tokens(assembler, index, len(delta.token_ids), now)

    def finish(self, assembler: RequestAssembler, at: float, error_code: str | None = None) -> None:
        self.metrics.finished(assembler, self.start + at, error_code)

    def run(self, call: Call | None = None) -> RequestAssembler:
        """One ordinary request: 10 prompt tokens of which 4 cached, scheduled at 0.25, tokens at 0.5, 0.75 and 1.5.

        Its client takes until 2.0 to read them.
        """
        assembler = self.begin(call=call, max_tokens=3)
        self.tokens(assembler, 0.5, cached=4)
        self.tokens(assembler, 0.75, cached=4)
        self.tokens(assembler, 1.5, cached=4, finish_reason="length")
        self.finish(assembler, 2.0)
        return assembler


@dataclass
class Engine:
    """The engine as a front end sees it, for tests to set."""

    status: EngineStatus = field(default_factory=EngineStatus)
    info: EngineInfo | None = None
    ready: bool = True
    now: float = 1000.0


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def make_stats() -> Callable[..., EngineStats]:
    def make(**given: Any) -> EngineStats:
        buckets = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        buckets[1], buckets[3], buckets[-1] = 4, 5, 1  # steps of 2, of 5..8 and of more than 16,384 tokens
        values = {
            "running": 3,
            "waiting": 5,
            "max_num_seqs": 8,
            "steps": 10,
            "prompt_tokens": 1000,
            "computed_tokens": 20_048,
            "generated_tokens": 300,
            "preemptions": 2,
            "mean_rows": 3.0,
            "mean_batch_occupancy": 0.375,
            "page_size": 16,
            "pages_total": 200,
            "pages_used": 50,
            "pages_cached": 30,
            "peak_pages_used": 60,
            "prefix_query_tokens": 1000,
            "prefix_hit_tokens": 250,
            "prefix_cache_hit_rate": 0.25,
            "step_token_buckets": tuple(buckets),
            "device_failures": 1,
        }
        return EngineStats(**{**values, **given})

    return make


@pytest.fixture
def engine_info() -> EngineInfo:
    limits = Limits(num_pages=201, page_size=16, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=2048)
    return EngineInfo(
        limits=limits,
        vocab_size=512,
        eos_token_ids=(1,),
        max_logprobs=20,
        device="cpu",
        platform="cpu",
        dtype="float32",
    )


@pytest.fixture
def make_metrics(engine: Engine) -> Callable[..., ServerMetrics]:
    """make_metrics(**settings): metrics of a server of the model "tiny"."""

    def make(**settings: Any) -> ServerMetrics:
        return ServerMetrics(
            ServerSettings(**settings),
            "tiny",
            lambda: engine.status,
            lambda: engine.info,
            lambda: engine.ready,
            lambda: engine.now,
        )

    return make


@pytest.fixture
def drive() -> type[Driver]:
    return Driver


@pytest.fixture
def call() -> type[Call]:
    return Call


@pytest.fixture
def traceparent() -> str:
    return TRACEPARENT

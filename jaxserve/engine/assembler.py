"""The front end's side of one request: token messages in, text deltas and the finished `RequestOutput` out.

Stop strings are found here, because only text knows them: `feed` then says which sample the engine shall end.
"""

import math
from dataclasses import dataclass, field

from jaxserve.errors import EngineError, NumericalError
from jaxserve.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestDelta,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
    TokenOutput,
)
from jaxserve.text.detokenizer import OutputText
from jaxserve.text.tokenizer import Tokenizer


@dataclass
class _Sample:
    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestAssembler:
    """Follows the n samples of one request."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer):
        self.request = request
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.error: EngineError | None = None
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._samples = [
            _Sample(OutputText(tokenizer, request.params, request.prompt_token_ids)) for _ in range(request.params.n)
        ]
        self._prompt_logprobs: list[TokenLogprobs] = []

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self._samples)

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Of each sample; None = unfinished."""
        return [sample.finish_reason for sample in self._samples]

    @property
    def num_generated_tokens(self) -> list[int]:
        """Of each sample, those after a stop string excluded."""
        return [len(sample.token_ids) for sample in self._samples]

    def feed(self, output: TokenOutput, now: float) -> tuple[RequestDelta | None, bool]:
        """Takes in one message; returns what it adds (None: nothing) and whether the engine must end the sample.

        now: time.monotonic() seconds. Messages for a sample that a stop string already ended are ignored.
        """
        sample = self._samples[output.index]
        self._measure(output, now)
        if output.prompt_logprobs:
            self._prompt_logprobs += output.prompt_logprobs
        if sample.finish_reason is not None:
            return None, False
        text, stop = sample.text.append(output.token_ids)
        new = output.token_ids[: sample.text.tokens_used - len(sample.token_ids)]
        logprobs = (output.logprobs or [])[: len(new)]
        sample.token_ids += new
        sample.logprobs += logprobs
        must_end = False
        if stop is not None:
            sample.finish_reason, sample.stop_reason = "stop", stop
            must_end = output.finish_reason is None
        elif output.finish_reason is not None:
            sample.finish_reason, sample.stop_reason = output.finish_reason, output.stop_reason
            text += sample.text.flush()
            if output.finish_reason == "error":
                self.error = _error(self.request.id, output.stop_reason)
        if not (text or new or sample.finish_reason):
            return None, must_end
        delta = RequestDelta(
            index=output.index,
            text=text,
            token_ids=new,
            logprobs=self._logprobs(logprobs) if self.request.params.logprobs is not None else None,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )
        return delta, must_end

    def output(self) -> RequestOutput:
        """Everything so far."""
        params = self.request.params
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *self._logprobs(self._prompt_logprobs)]
        return RequestOutput(
            request_id=self.request.id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index=index,
                    text=sample.text.text,
                    token_ids=sample.token_ids,
                    cumulative_logprob=(
                        math.fsum(entry.logprob for entry in sample.logprobs) if params.logprobs is not None else None
                    ),
                    logprobs=self._logprobs(sample.logprobs) if params.logprobs is not None else None,
                    finish_reason=sample.finish_reason,
                    stop_reason=sample.stop_reason,
                )
                for index, sample in enumerate(self._samples)
            ],
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.metrics.cached_tokens,
            metrics=self.metrics,
        )

    def _measure(self, output: TokenOutput, now: float) -> None:
        metrics = self.metrics
        if output.index == 0:
            metrics.cached_tokens = output.cached_tokens
        metrics.preemptions = max(metrics.preemptions, output.preemptions)
        if output.scheduled_time is not None and metrics.scheduled_time is None:
            metrics.scheduled_time = output.scheduled_time
            metrics.queue_time = output.scheduled_time - metrics.arrival_time
        if not output.token_ids:
            return
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            metrics.time_to_first_token = now - metrics.arrival_time
        metrics.last_token_time = now
        generated = max(len(sample.token_ids) for sample in self._samples) + 1
        if generated > 1:
            metrics.time_per_output_token = (now - metrics.first_token_time) / (generated - 1)

    def _logprobs(self, entries: list[TokenLogprobs]) -> list[dict[int, Logprob]]:
        return [self._position(entry) for entry in entries]

    def _position(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """The chosen token first, then the likeliest ones in order."""
        text = self._tokenizer.token_text
        found = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
        for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            found.setdefault(token, Logprob(logprob, rank, text(token)))
        return found


def _error(request_id: str, reason: int | str | None) -> EngineError:
    if reason == "numerical_error":
        return NumericalError(f"request {request_id}: no token could be sampled: the logits hold NaN, or all are -inf")
    return EngineError(f"request {request_id}: {reason}")

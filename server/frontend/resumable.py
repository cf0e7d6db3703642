"""One unfinished request as its front end follows it: what engines tell goes in, what the next one needs comes out."""

from dataclasses import dataclass, field, replace

from jaxserve.request import Request, SampleProgress, TokenOutput
from server.frontend.engine_client import Sink


@dataclass
class _Sample:
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    abort: str | None = None  # why it shall end, once that was asked for
    cached_tokens: int | None = None  # as first told
    preemptions: int = 0  # as last told
    earlier_preemptions: int = 0  # of them, on engines before this one


@dataclass(eq=False)
class ResumableRequest:
    """sink: who is told of it."""

    request: Request
    sink: Sink
    _samples: list[_Sample] = field(init=False)
    _prompt_logprobs_sent: int = 0

    def __post_init__(self) -> None:
        self._samples = [_Sample() for _ in range(self.request.params.n)]

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self._samples)

    def take(self, output: TokenOutput) -> None:
        """Notes what is new, and makes what a later engine says fit what an earlier one had said."""
        sample = self._samples[output.index]
        sample.tokens += output.token_ids
        sample.finished = output.finish_reason is not None
        self._prompt_logprobs_sent += len(output.prompt_logprobs or ())
        if sample.cached_tokens is None:
            sample.cached_tokens = output.cached_tokens
        output.cached_tokens = sample.cached_tokens
        output.preemptions += sample.earlier_preemptions
        sample.preemptions = output.preemptions

    def abort(self, index: int | None, reason: str) -> None:
        """One sample shall end, or all that are unfinished."""
        for i, sample in enumerate(self._samples):
            if not sample.finished and index in (None, i):
                sample.abort = reason

    def end_aborted(self) -> list[TokenOutput]:
        """Where no engine can do it: the ends of the samples that shall end."""
        outputs = []
        for i, sample in enumerate(self._samples):
            if sample.abort is not None and not sample.finished:
                sample.finished = True
                outputs.append(
                    TokenOutput(
                        request_id=self.request.id,
                        index=i,
                        token_ids=[],
                        finish_reason="abort",
                        stop_reason=sample.abort,
                        cached_tokens=sample.cached_tokens or 0,
                        preemptions=sample.preemptions,
                    )
                )
        return outputs

    def resumption(self) -> Request:
        """The request as the next engine shall see it."""
        for sample in self._samples:
            sample.earlier_preemptions = sample.preemptions
        return replace(
            self.request,
            progress=tuple(SampleProgress(tuple(sample.tokens), sample.finished) for sample in self._samples),
            prompt_logprobs_sent=self._prompt_logprobs_sent,
        )

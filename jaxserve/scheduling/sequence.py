"""One sample of one request, as the scheduler follows it from arrival to finish.

In: a `Request` and its place in the order. Out: the one question everything is planned by,

    work = len(tokens) + pending - computed

the tokens whose keys and values are not (going to be) in the pool. A new prompt has much work, a decoding sequence 1.
"""

from dataclasses import dataclass, field
from enum import Enum

from jaxserve.request import FinishReason, Request, TokenLogprobs, TokenOutput
from jaxserve.scheduling.prefix import page_hash


class Status(Enum):
    WAITING = "waiting"  # no slot, no pages
    RUNNING = "running"  # a slot, and pages for every computed token
    FINISHED = "finished"  # no slot, no pages, unknown to the scheduler


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one sample; only the scheduler writes it, the packing of a step reads it."""

    request: Request
    index: int  # which of the request's n samples
    order: tuple[int, int]  # (priority, arrival): who goes first; unique
    final_length: int  # prompt and generated tokens at most
    hash_root: bytes | None  # what separates its pages from other users' in the prefix cache; None = never shared

    tokens: list[int] = field(init=False)  # prompt and generated ids the host knows
    num_prompt: int = field(init=False)
    needs_sync: bool = field(init=False)  # the host must know the last token before it plans the next
    status: Status = field(init=False, default=Status.WAITING)
    slot: int | None = field(init=False, default=None)
    pending: int = field(init=False, default=0)  # sampled by launched steps, not yet known to the host
    computed: int = field(init=False, default=0)  # tokens in the pool once every launched step has run
    pages: list[int] = field(init=False, default_factory=list)  # page i holds tokens [i * page_size, (i+1) * page_size)
    page_hashes: list[bytes] = field(init=False, default_factory=list)  # of full pages of known tokens, as asked for
    registered: int = field(init=False, default=0)  # leading pages the prefix cache knows
    prompt_logprobs_sent: int = field(init=False, default=0)
    cached_tokens: int = field(init=False, default=0)  # found in the prefix cache at first admission
    preemptions: int = field(init=False, default=0)
    scheduled_time: float | None = field(init=False, default=None)  # time.monotonic() of first admission
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        if self.request.progress:
            self.tokens += self.request.progress[self.index].token_ids
        self.prompt_logprobs_sent = self.request.prompt_logprobs_sent
        self.needs_sync = any(len(word) > 1 for word in self.request.bad_word_token_ids)

    @property
    def work(self) -> int:
        return len(self.tokens) + self.pending - self.computed

    @property
    def ready(self) -> bool:
        """May be in the next step: not waiting for launched steps, to end it or to tell its last token."""
        pending = self.pending
        return len(self.tokens) + pending < self.final_length and not (pending and self.needs_sync)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far, the pending ones too."""
        return len(self.tokens) + self.pending - self.num_prompt

    @property
    def prompt_logprobs_left(self) -> int:
        """Prompt tokens whose logprobs are still owed; the first one has none. Only sample 0 owes any."""
        if self.index or self.request.params.prompt_logprobs is None:
            return 0
        return self.num_prompt - 1 - self.prompt_logprobs_sent

    def page_hash(self, page: int, page_size: int) -> bytes:
        """The chained hash of full page number `page` of the known tokens; O(pages not asked for before)."""
        assert self.hash_root is not None
        hashes = self.page_hashes
        while len(hashes) <= page:
            start = len(hashes) * page_size
            tokens = self.tokens[start : start + page_size]
            assert len(tokens) == page_size, f"page {len(hashes)} is not full"
            hashes.append(page_hash(hashes[-1] if hashes else self.hash_root, tokens))
        return hashes[page]

    def end_at(self, token: int) -> tuple[FinishReason, int | str | None] | None:
        """Why `token`, which is about to be appended, is the last: (finish_reason, stop_reason), or None."""
        request, params, length = self.request, self.request.params, len(self.tokens)
        if length - self.num_prompt >= params.min_tokens:
            if token in request.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if params.stop_token_ids and token in params.stop_token_ids:
                return "stop", token
        return ("length", None) if length + 1 >= self.final_length else None

    def take_unsent(self, start: int, computed: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
        """Of the logprobs of prompt tokens start + 1, ..., those not sent before a preemption; marks them as sent."""
        if not computed or not self.prompt_logprobs_left:
            return None
        unsent = computed[self.prompt_logprobs_sent - start :]
        self.prompt_logprobs_sent += len(unsent)
        return unsent or None

    def output(
        self,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
    ) -> TokenOutput:
        """The message that tells what is new, and the state it leaves the sequence in."""
        return TokenOutput(
            request_id=self.request.id,
            index=self.index,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            scheduled_time=self.scheduled_time,
        )

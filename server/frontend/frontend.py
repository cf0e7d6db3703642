"""One front end: all that both protocols need, in the terms of neither. Text in, deltas out; never blocks its loop."""

import asyncio
import difflib
import functools
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jaxserve.config import EngineConfig
from jaxserve.engine.assembler import RequestAssembler
from jaxserve.engine.text_front import TextFront, check_text, open_model
from jaxserve.errors import InvalidRequestError, TokenOutOfRangeError
from jaxserve.request import Request, SamplingParams
from server.errors import ServiceError, service_error
from server.frontend.capacity import Capacity
from server.frontend.engine_client import EngineClient
from server.frontend.generation import Generation
from server.frontend.health import NO_TEXT, Health
from server.frontend.probe import probe_when_idle
from server.frontend.prompts import CallOptions, Conversation, Prompt, check_variables, truncated
from server.observability.metrics import ServerMetrics
from server.settings import ServerSettings

T = TypeVar("T")

ID_PREFIX = "gen-"
DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
TEXT_THREADS = 4
INLINE_CHARS = 2048  # text up to here is tokenized on the event loop, in well under a millisecond


class Frontend:
    """Lives on one event loop. `start` first; `close` ends what is still running.

    index: which of several front ends this is.
    """

    def __init__(
        self,
        settings: ServerSettings,
        config: EngineConfig,
        engine: EngineClient,
        *,
        index: int = 0,
    ):
        self.settings = settings
        self.config = config
        self.engine = engine
        self.index = index
        self.created = int(time.time())
        self.model_root = config.model.model or DEFAULT_MODEL_NAME
        self.model_names = settings.served_model_name or (_model_name(self.model_root),)
        self.draining = False
        self.drain_requested: Callable[[], None] = self.begin_drain  # what the admin port's drain does
        self.health = Health(engine, lambda: self.draining, lambda: self._text is not None)
        self.metrics = ServerMetrics(
            settings,
            self.model_names[0],
            lambda: engine.status,
            lambda: engine.info,
            lambda: self.health.ready().ok,
        )
        self.capacity = Capacity(settings, engine)
        self.open_calls: set[Generation] = set()
        self._text: TextFront | None = None
        self._workers = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="jaxserve-text")
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begins to listen to the engine; text can be served as soon as it is ready."""
        await self.engine.start()
        self._tasks = [asyncio.create_task(self._prepare_text())]
        if self.index == 0:
            probing = probe_when_idle(self.engine, ID_PREFIX, lambda: self.draining)
            self._tasks.append(asyncio.create_task(probing))

    async def wait_ready(self) -> None:
        """Raises EngineError, ConfigError or a ModelError if it will never be."""
        await asyncio.shield(self._tasks[0])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for call in [*self.open_calls]:
            call.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._text is not None:
            self._text.close()
        await self.engine.close()

    @property
    def text(self) -> TextFront:
        """Raises ServiceError not_ready before the engine was ready for the first time."""
        if self._text is None:
            raise self._not_ready()
        return self._text

    def check_model(self, name: str | None) -> str:
        """The name to answer with; None or "" asks for the model there is. Raises ServiceError model_not_found."""
        if not name:
            return self.model_names[0]
        if name in self.model_names:
            return name
        near = difflib.get_close_matches(name, self.model_names, n=1, cutoff=0.0)
        raise ServiceError(
            "model_not_found", f"model={name[:200]!r} is not served here; did you mean {near[0]!r}?", param="model"
        )

    def sampling_params(self, **given: Any) -> SamplingParams:
        """The model's defaults under what was given. Raises InvalidRequestError."""
        return self.text.default_sampling_params(**given)

    async def generate(self, prompts: Sequence[Prompt], params: SamplingParams, options: CallOptions) -> Generation:
        """Starts one request per prompt, all or none.

        Raises InvalidRequestError, or ServiceError not_ready, draining, queue_full.
        """
        try:
            return await self._generate(prompts, params, options)
        except Exception as error:
            self.metrics.rejected(service_error(error).code)
            raise

    async def _generate(self, prompts: Sequence[Prompt], params: SamplingParams, options: CallOptions) -> Generation:
        arrival = time.monotonic()
        text = self._check_open()
        samples, tokens = len(prompts) * params.n, 0
        self.capacity.reserve(samples)
        try:
            requests, assemblers = [], []
            call_id = ID_PREFIX + uuid.uuid4().hex
            for position, prompt in enumerate(prompts):
                if position:
                    await asyncio.sleep(0)  # hundreds of prompts, each short enough to be tokenized here
                prompt_text, ids = await self.encode(prompt, options)
                request_id = f"{call_id}.{position}" if position else call_id
                try:
                    request = self._request(text, ids, params, options, request_id, arrival)
                except InvalidRequestError as error:
                    if error.field == "prompt_token_ids":  # what the client sent goes by another name
                        error.field = "messages" if isinstance(prompt, Conversation) else "prompt"
                    raise
                requests.append(request)
                assemblers.append(RequestAssembler(request, prompt_text, text.tokenizer))
            self._check_open()  # it may have begun to drain meanwhile
            wanted = sum(len(request.prompt_token_ids) for request in requests)
            self.capacity.reserve_tokens(wanted)
            tokens = wanted
            generation = Generation(requests, assemblers, self.engine, self.metrics)
            generation.start()
        except BaseException:
            self.capacity.release(samples, tokens, served=False)
            raise
        for request in requests:
            self.metrics.begin(request.id, options)
        self.open_calls.add(generation)
        generation.when_closed(lambda: self._ended(generation, samples, tokens))
        return generation

    async def encode(self, prompt: Prompt, options: CallOptions) -> tuple[str | None, list[int]]:
        """(text as the model sees it, or None for token ids; token ids). Long work happens on one of a few threads."""
        text = self.text
        add = options.add_special_tokens
        prompt_text: str | None
        if isinstance(prompt, Conversation):
            check_variables(prompt.template_kwargs)
            prompt_text, ids = await self._on_worker(
                lambda: text.encode_chat(
                    prompt.messages,
                    add_special_tokens=bool(add),
                    add_generation_prompt=prompt.add_generation_prompt,
                    continue_final_message=prompt.continue_final_message,
                    tools=prompt.tools,
                    **prompt.template_kwargs,
                )
            )
        elif isinstance(prompt, str):
            prompt_text = prompt
            encode = functools.partial(text.encode_text, prompt, add is not False)
            ids = encode() if len(prompt) <= INLINE_CHARS else await self._on_worker(encode)
        else:
            prompt_text, ids = None, list(prompt)
        kept = truncated(ids, options, text.limits.max_model_len)
        if len(kept) < len(ids) and prompt_text is not None:
            prompt_text = text.tokenizer.decode(kept, skip_special_tokens=False)
        return prompt_text, kept

    async def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown. Raises TokenOutOfRangeError."""
        tokenizer, info = self.text.tokenizer, self.engine.info
        known = max(tokenizer.vocab_size, info.vocab_size if info is not None else 0)  # the model may have more
        for token in ids:
            if not 0 <= token < known:
                raise TokenOutOfRangeError(f"tokens holds token id {token}, outside [0, {known})", "tokens", token)
        decode = functools.partial(tokenizer.decode, ids, skip_special_tokens=False)
        return decode() if len(ids) <= INLINE_CHARS // 4 else await self._on_worker(decode)

    def abort(self, request_id: str) -> None:
        """Ends a call of any front end, by the id its responses carry (with or without their prefix)."""
        self.engine.abort(ID_PREFIX + request_id.rpartition("-")[2])

    def begin_drain(self) -> None:
        """Not ready from now on, and nothing new is accepted; what runs goes on."""
        self.draining = True

    async def drained(self, timeout: float) -> None:
        """Returns when nothing runs any more; after `timeout` seconds ends the rest with an error of their own."""
        deadline = time.monotonic() + timeout
        while self.open_calls and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for call in [*self.open_calls]:
            call.end("draining")
        for _ in range(20):  # the protocols tell their clients
            if not self.open_calls:
                return
            await asyncio.sleep(0.05)

    def _check_open(self) -> TextFront:
        if self.draining:
            raise ServiceError("draining", "the server is draining and accepts nothing new", retry_after=5)
        if self.engine.status.phase != "ready":
            raise self._not_ready()
        if (stuck := self.health.silence()) is not None:
            raise ServiceError("not_ready", f"the engine does not answer: {stuck}", retry_after=2)
        return self.text

    def _not_ready(self) -> ServiceError:
        status = self.engine.status
        if status.phase == "dead":
            return ServiceError("engine_dead", f"the engine is dead: {status.detail}")
        if status.phase == "ready":
            return ServiceError("not_ready", NO_TEXT, retry_after=2)
        detail = f": {status.detail}" if status.detail else ""
        return ServiceError("not_ready", f"the engine is {status.phase}{detail}", retry_after=2)

    def _request(
        self,
        text: TextFront,
        ids: list[int],
        params: SamplingParams,
        options: CallOptions,
        request_id: str,
        arrival: float,
    ) -> Request:
        timeout = self.settings.default_timeout if options.timeout is None else options.timeout
        return text.admission.request(
            ids,
            params,
            priority=options.priority,
            timeout=timeout,
            cache_salt=options.cache_salt,
            request_id=request_id,
            arrival_time=arrival,
        )

    def _ended(self, generation: Generation, samples: int, tokens: int) -> None:
        self.open_calls.discard(generation)
        self.capacity.release(samples, tokens, served=True)

    async def _on_worker(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    async def _prepare_text(self) -> None:
        await self._on_worker(lambda: check_text(self.config))  # before minutes of waiting for the engine
        info = await self.engine.wait_ready()
        seed = (self.config.seed, self.index)

        def build() -> TextFront:
            text = TextFront(
                self.config,
                open_model(self.config),
                info.limits,
                vocab_size=info.vocab_size,
                eos_token_ids=info.eos_token_ids,
                seed=seed,
            )
            text.encode_text("a")  # what a tokenizer makes at its first use, with or without special tokens,
            text.tokenizer.encode("a", parse_special=False)  # can take a second, which nobody waits for here
            return text

        self._text = await self._on_worker(build)


def _model_name(root: str) -> str:
    """A hub id as it is; of a path the last part, without .gguf."""
    path = Path(root)
    return path.name.removesuffix(".gguf") if path.exists() else root

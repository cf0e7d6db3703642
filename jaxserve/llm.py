"""`LLM`: a model in this process, for notebooks and scripts. `generate`: the same in one line.

Text is handled on the caller's thread, tokens on the engine's; Ctrl-C in a call ends that call's requests and frees
their pages, and the engine goes on.
"""

import queue
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxserve.config import EngineConfig
from jaxserve.engine.assembler import RequestAssembler
from jaxserve.engine.build import StartupTimes, prepare, start_core
from jaxserve.engine.loop import EngineLoop, Message
from jaxserve.engine.progress import RequestProgress
from jaxserve.engine.stats import EngineStats, engine_stats
from jaxserve.engine.text_front import TextFront
from jaxserve.errors import EngineError, InvalidRequestError
from jaxserve.request import Request, RequestDelta, RequestOutput, SamplingParams
from jaxserve.runner.memory import MemoryPlan
from jaxserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A loaded model and its engine. A context manager; `close` stops it.

    model: Hugging Face directory, .gguf file or hub id; None = the embedded default model (SmolLM2-135M-Instruct).
    options: the settings of `jaxserve/config.py`, by name (dtype, max_model_len, max_num_seqs, num_pages, ...).

    Raises ConfigError, MemoryPlanError or a ModelError before anything large is loaded.
    """

    def __init__(self, model: str | Path | None = None, **options: Any):
        self.config = EngineConfig.from_options(model=None if model is None else str(model), **options)
        prepared = self.prepared = prepare(self.config)
        self.memory_plan: MemoryPlan = prepared.plan
        if self.config.show_progress:
            Console(stderr=True).print(prepared.plan.table())
        self.startup_times: StartupTimes
        model_config = prepared.dimensions.model
        self._front = TextFront(
            self.config,
            prepared.checkpoint,
            prepared.limits,
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
        )
        self.tokenizer: Tokenizer = self._front.tokenizer
        self.admission = self._front.admission
        core, self.startup_times = start_core(self.config, prepared)
        self._loop = EngineLoop(core)
        self._finalizer = weakref.finalize(self, self._loop.close)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine; calls in progress on other threads get an EngineError. Safe to call twice."""
        self._finalizer()
        self._front.close()

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults (generation_config.json) under `overrides`."""
        return self._front.default_sampling_params(**overrides)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs in the order of the prompts.

        prompts        text, token ids, or a list of either
        params         one for all, or one per prompt; None = `default_sampling_params()`
        show_progress  a tqdm bar with tokens/s; None = in terminals and notebooks
        priority       lower runs first, under scheduling_policy="priority"
        timeout        seconds; a request not finished by then ends with finish_reason "abort"
        cache_salt     requests share cached prefixes only with requests of the same salt

        Raises InvalidRequestError before anything runs if any prompt or parameter is unusable; EngineError.
        """
        options = {"priority": priority, "timeout": timeout, "cache_salt": cache_salt}
        return self._run(_prompt_list(prompts), params, show_progress, options)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, through the model's chat template.

        messages: [{"role": "user", "content": "..."}, ...]. The other arguments are those of `generate`.
        """
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        chats = [
            self._front.encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        texts = [text for text, _ in chats]
        return self._run([ids for _, ids in chats], params, show_progress, options, texts)

    def stream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None, **options: Any
    ) -> Generator[RequestDelta, None, None]:
        """Yields what is new, as it is generated: text deltas of the samples of one prompt or conversation.

        Closing the generator ends the request. Arguments as for `generate`.
        """
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            _, prompt = self._front.encode_chat(prompt)  # type: ignore[arg-type]
        request = self.admission.request(prompt, params or self.default_sampling_params(), **options)  # type: ignore[arg-type]
        return self._stream(request, prompt if isinstance(prompt, str) else None)

    def render(self, messages: Conversation, **options: Any) -> str:
        """The prompt text the chat template makes of a conversation. Raises ChatTemplateError."""
        return self._front.render(messages, **options)

    def stats(self) -> EngineStats:
        return engine_stats(self._loop.core)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, before the next step."""
        self._loop.reset_prefix_cache()

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        show_progress: bool | None,
        options: Mapping[str, Any],
        texts: Sequence[str | None] | None = None,  # of prompts that were tokenized already
    ) -> list[RequestOutput]:
        if texts is None:
            texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        if params is None:
            params = self.default_sampling_params()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequestError(f"params holds {len(each)} entries for {len(prompts)} prompts", "params", each)
        requests = [self.admission.request(p, q, **options) for p, q in zip(prompts, each, strict=True)]
        assemblers = {
            request.id: RequestAssembler(request, text, self.tokenizer)
            for request, text in zip(requests, texts, strict=True)
        }
        show = self.config.show_progress if show_progress is None else show_progress
        with RequestProgress(len(prompts), show) as bar, closing(self._deltas(requests, assemblers)) as deltas:
            for request_id, delta in deltas:
                bar.update(len(delta.token_ids), assemblers[request_id].finished)
        failed = next((a.error for a in assemblers.values() if a.error is not None), None)
        if failed is not None:
            raise failed
        return [assembler.output() for assembler in assemblers.values()]

    def _stream(self, request: Request, prompt: str | None) -> Generator[RequestDelta, None, None]:
        assembler = RequestAssembler(request, prompt, self.tokenizer)
        for _, delta in self._deltas([request], {request.id: assembler}):
            yield delta
        if assembler.error is not None:
            raise assembler.error

    def _deltas(
        self, requests: Sequence[Request], assemblers: Mapping[str, RequestAssembler]
    ) -> Generator[tuple[str, RequestDelta], None, None]:
        """Runs the requests; returns, however it is left, only when the engine holds nothing of them any more."""
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        open_samples = {(request.id, index) for request in requests for index in range(request.params.n)}
        try:
            self._loop.submit(requests, messages.put)
            while open_samples:
                for output in self._next_message(messages):
                    if output.finish_reason is not None:
                        open_samples.discard((output.request_id, output.index))
                    delta, must_end = assemblers[output.request_id].feed(output, time.monotonic())
                    if must_end:
                        self._loop.abort(output.request_id, output.index, "stop_string")
                    if delta is not None:
                        yield output.request_id, delta
        except EngineError:
            raise  # nothing is left to end
        except BaseException:
            for request in requests:
                self._loop.abort(request.id)
            self._loop.flush()
            raise

    @staticmethod
    def _next_message(messages: "queue.SimpleQueue[Message]") -> list[Any]:
        message = messages.get()
        if isinstance(message, EngineError):
            raise message
        return message


_cached: dict[str, LLM] = {}


def generate(prompt: Prompt | Sequence[Prompt], model: str | Path | None = None, **sampling: Any) -> Any:
    """Completes a prompt, or a list of prompts, and returns the text, or the list of texts.

    The model stays loaded for the next call; asking for another one replaces it. sampling: fields of SamplingParams
    over the model's own defaults; max_tokens is 128 unless given.

    >>> jaxserve.generate("The capital of France is", temperature=0.0, max_tokens=8)
    """
    key = "" if model is None else str(model)
    if key not in _cached:
        for old in list(_cached):
            _cached.pop(old).close()
        _cached[key] = LLM(model)
    llm = _cached[key]
    outputs = llm.generate(prompt, llm.default_sampling_params(**{"max_tokens": 128, **sampling}))
    texts = [output.outputs[0].text for output in outputs]
    return texts[0] if _is_single(prompt) else texts


def _is_single(prompts: Any) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _prompt_list(prompts: Any) -> list[Prompt]:
    if not isinstance(prompts, str | Sequence):
        raise InvalidRequestError(
            f"prompts must be text, token ids, or a list of either, not {type(prompts).__name__}", "prompts", prompts
        )
    return [prompts] if _is_single(prompts) else list(prompts)

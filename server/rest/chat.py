"""POST /v1/chat/completions: a conversation in, OpenAI's chat.completion out, whole or as events."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.request import CompletionOutput, Logprob, RequestDelta, RequestOutput
from server.frontend.generation import Generation
from server.rest import params
from server.rest.answer import Call, finish_reason
from server.rest.body import read_body
from server.rest.call import call_options, frontend_of
from server.rest.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from server.rest.respond import event_stream_responses, respond, use_request_id
from server.rest.types_chat import ChatChunk, ChatRequest, ChatResponse
from server.rest.types_misc import json_body

ENDPOINT = "/v1/chat/completions"

router = APIRouter()


@router.post(
    ENDPOINT,
    summary="Answer a conversation",
    response_model=None,
    responses=event_stream_responses(ChatResponse, ChatChunk),
    openapi_extra=json_body(ChatRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation through the model's chat template.

    `stream: true` answers with server-sent events: for each choice one with the role, those with what is new, one with
    the finish_reason; then, where asked for, one with the usage of all; then `[DONE]`.
    """
    frontend = frontend_of(request)
    body = await read_body(request, ChatRequest)
    use_request_id(request, body.request_id)
    model = frontend.check_model(body.model)
    given = params.chat_sampling(body)
    conversation = params.conversation_of(body)
    with params.spelled(params.chat_names(body)):
        sampling = frontend.sampling_params(**given)
    call = Call(
        frontend=frontend,
        prompts=[conversation],
        params=sampling,
        options=call_options(request, ENDPOINT, **params.call_fields(body)),
        model=model,
        body=body,
    )
    return await respond(request, ChatForm(call, body, params.continued_text(conversation) if body.echo else ""))


class ChatForm:
    """See `answer.Form`. A chat call has one prompt, so choices are its samples. echoed: text they begin with."""

    id_prefix = "chatcmpl-"
    objects = ("chat.completion", "chat.completion.chunk")

    def __init__(self, call: Call, body: ChatRequest, echoed: str):
        self.call = call
        self._body = body
        self._names = TokenNames(call.frontend.text.tokenizer, bool(body.return_tokens_as_token_ids))
        self._echoed = echoed
        self._opened = False

    def names(self) -> AbstractContextManager[None]:
        return params.spelled(params.chat_names(self._body))

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        answer: dict[str, Any] = {"choices": [self._choice(sample) for sample in output.outputs]} | self._tier()
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or ())
        return answer

    def begin(self, generation: Generation) -> None:
        self._prompt_token_ids = generation.requests[0].prompt_token_ids

    def add(self, position: int, delta: RequestDelta) -> list[dict[str, Any]]:
        parts = [] if self._opened else self._open()
        news = self._entry(delta.index, {"content": delta.text})
        news["logprobs"] = self._logprobs(delta.logprobs) if delta.logprobs else None
        if self._body.return_token_ids:
            news["token_ids"] = delta.token_ids
        if delta.text or delta.logprobs or (self._body.return_token_ids and delta.token_ids):
            parts.append({"choices": [news]} | self._tier())
        if delta.finish_reason is not None:
            end = {"finish_reason": finish_reason(delta.finish_reason), "stop_reason": delta.stop_reason}
            parts.append({"choices": [self._entry(delta.index, {}) | end]} | self._tier())
        return parts

    def _open(self) -> list[dict[str, Any]]:
        """The role of every choice, before any content."""
        self._opened = True
        beside = self._tier()
        if self._body.return_token_ids:
            beside["prompt_token_ids"] = self._prompt_token_ids
        samples = range(self.call.params.n)
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if self._echoed:
            deltas.append({"content": self._echoed})
        return [{"choices": [self._entry(i, delta)]} | beside for delta in deltas for i in samples]

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": sample.index,
            "message": {"role": "assistant", "content": self._echoed + sample.text, "refusal": None},
            "logprobs": self._logprobs(sample.logprobs) if sample.logprobs is not None else None,
            "finish_reason": finish_reason(sample.finish_reason),
            "stop_reason": sample.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = sample.token_ids
        return choice

    def _entry(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, positions: list[dict[int, Logprob]]) -> dict[str, Any]:
        return chat_logprobs(positions, self.call.params.logprobs or 0, self._names)

    def _tier(self) -> dict[str, Any]:
        return {"service_tier": "default"} if self._body.service_tier is not None else {}

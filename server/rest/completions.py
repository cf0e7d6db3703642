"""POST /v1/completions: prompts as text or token ids in, OpenAI's text_completion out, whole or as events."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.request import CompletionOutput, RequestDelta, RequestOutput
from server.frontend.generation import Generation
from server.rest import params
from server.rest.answer import Call, finish_reason
from server.rest.body import read_body
from server.rest.call import call_options, frontend_of
from server.rest.logprobs import TextOffsets, TokenNames, completion_logprobs, prompt_logprobs, prompt_offsets
from server.rest.respond import event_stream_responses, respond, use_request_id
from server.rest.types_completion import CompletionRequest, CompletionResponse
from server.rest.types_misc import json_body

ENDPOINT = "/v1/completions"

router = APIRouter()


@router.post(
    ENDPOINT,
    summary="Complete prompts",
    response_model=None,
    responses=event_stream_responses(CompletionResponse, CompletionResponse),
    openapi_extra=json_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Goes on from a text, from token ids, or from a list of either; the text as it is, without a chat template.

    `stream: true` answers with server-sent events, each one text_completion object with what is new, then `[DONE]`.
    """
    frontend = frontend_of(request)
    body = await read_body(request, CompletionRequest)
    use_request_id(request, body.request_id)
    model = frontend.check_model(body.model)
    prompts = params.prompts_of(body)
    given = params.completion_sampling(body)
    with params.spelled(params.completion_names()):
        sampling = frontend.sampling_params(**given)
    call = Call(
        frontend=frontend,
        prompts=prompts,
        params=sampling,
        options=call_options(request, ENDPOINT, **params.call_fields(body)),
        model=model,
        body=body,
    )
    return await respond(request, CompletionForm(call, body))


class CompletionForm:
    """See `answer.Form`."""

    id_prefix = "cmpl-"
    objects = ("text_completion", "text_completion")

    def __init__(self, call: Call, body: CompletionRequest):
        self.call = call
        self._body = body
        self._echo = bool(body.echo)
        self._names = TokenNames(call.frontend.text.tokenizer, bool(body.return_tokens_as_token_ids))
        # Of a stream: by prompt, from its first chunk on
        self._generation: Generation
        self._offsets: dict[int, list[TextOffsets | None]] = {}  # one a sample; None = no logprobs
        self._held: dict[int, list[RequestDelta]] = {}  # what came before the prompt's logprobs were complete

    def names(self) -> AbstractContextManager[None]:
        return params.spelled(params.completion_names())

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {
            "choices": [
                self._choice(position, output, sample)
                for position, output in enumerate(outputs)
                for sample in output.outputs
            ]
        }

    def begin(self, generation: Generation) -> None:
        self._generation = generation

    def add(self, position: int, delta: RequestDelta) -> list[dict[str, Any]]:
        if position in self._offsets:
            return self._news(position, delta)
        held = self._held.setdefault(position, [])
        held.append(delta)
        opening = self._open(position)
        if opening is None:
            return []
        return opening + [part for delta in self._held.pop(position) for part in self._news(position, delta)]

    def _open(self, position: int) -> list[dict[str, Any]] | None:
        """A chunk with the prompt for each choice, where asked for; None while the prompt's logprobs are incomplete."""
        request = self._generation.requests[position]
        params, prompt_ids = request.params, request.prompt_token_ids
        opening: dict[str, Any] = {}
        echoed = ""
        if self._body.return_token_ids:
            opening |= {"prompt_token_ids": prompt_ids, "token_ids": []}
        if self._echo:
            output = self._generation.output(position)
            if params.logprobs is not None:
                if len(output.prompt_logprobs or ()) < len(prompt_ids):
                    return None
                opening["logprobs"] = self._prompt_logprobs(output)
            opening["text"] = echoed = self._echoed(output)
        tokenizer = self._names.tokenizer
        self._offsets[position] = [
            TextOffsets(tokenizer, params, prompt_ids, len(echoed)) if params.logprobs is not None else None
            for _ in range(params.n)
        ]
        return [{"choices": [self._entry(position, i) | opening]} for i in range(params.n)] if opening else []

    def _news(self, position: int, delta: RequestDelta) -> list[dict[str, Any]]:
        if not (delta.text or delta.finish_reason or delta.logprobs or self._body.return_token_ids):
            return []
        entry = self._entry(position, delta.index)
        entry["text"] = delta.text
        offsets = self._offsets[position][delta.index]
        if offsets is not None and delta.logprobs:
            entry["logprobs"] = completion_logprobs(
                delta.token_ids, delta.logprobs, offsets.add(delta.token_ids), self._names
            )
        if delta.finish_reason is not None:
            entry |= {"finish_reason": finish_reason(delta.finish_reason), "stop_reason": delta.stop_reason}
        if self._body.return_token_ids:
            entry["token_ids"] = delta.token_ids
        return [{"choices": [entry]}]

    def _choice(self, position: int, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        echoed = self._echoed(output) if self._echo else ""
        choice = self._entry(position, sample.index) | {
            "text": echoed + sample.text,
            "finish_reason": finish_reason(sample.finish_reason),
            "stop_reason": sample.stop_reason,
        }
        if sample.logprobs is not None:
            starts = TextOffsets(self._names.tokenizer, self.call.params, output.prompt_token_ids, len(echoed))
            offsets = starts.add(sample.token_ids)
            parts = [completion_logprobs(sample.token_ids, sample.logprobs, offsets, self._names)]
            if self._echo:
                parts.insert(0, self._prompt_logprobs(output))
            choice["logprobs"] = {key: [entry for part in parts for entry in part[key]] for key in parts[0]}
        if self._body.return_token_ids:
            choice |= {"token_ids": sample.token_ids, "prompt_token_ids": output.prompt_token_ids}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or ())
        return choice

    def _entry(self, position: int, index: int) -> dict[str, Any]:
        return {"index": position * self.call.params.n + index, "text": "", "logprobs": None, "finish_reason": None}

    def _echoed(self, output: RequestOutput) -> str:
        """The prompt as it was sent; of token ids, or where it was truncated, the text they stand for."""
        if output.prompt is not None:
            return output.prompt
        skip = self.call.params.skip_special_tokens
        return self._names.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=skip)

    def _prompt_logprobs(self, output: RequestOutput) -> dict[str, Any]:
        ids, tokenizer = output.prompt_token_ids, self._names.tokenizer
        offsets = prompt_offsets(tokenizer, ids, self._echoed(output))
        return completion_logprobs(ids, output.prompt_logprobs or (), offsets, self._names)

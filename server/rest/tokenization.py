"""POST /tokenize and /detokenize: what the generation routes would make of a prompt, and the text of token ids."""

import asyncio

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from server.errors import ServiceError
from server.frontend.frontend import Prompt
from server.rest.body import read_body
from server.rest.call import call_options, frontend_of
from server.rest.params import conversation_of, spelled
from server.rest.types_chat import ChatRequest
from server.rest.types_misc import error_responses, json_body
from server.rest.types_tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")

router = APIRouter()
_ERRORS = error_responses(400, 401, 404, 408, 413, 415, 500, 503)


@router.post("/tokenize", response_model=TokenizeResponse, responses=_ERRORS, openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The token ids a generation route would start from. Nothing is generated."""
    body = await read_body(request, TokenizeRequest)
    frontend = frontend_of(request)
    frontend.check_model(body.model)
    prompt = _prompt_of(body)
    options = call_options(request, "/tokenize", add_special_tokens=body.add_special_tokens)
    with spelled({"prompt": "messages"} if body.messages is not None else {}):
        _, ids = await frontend.encode(prompt, options)
    text, texts = frontend.text, None
    if body.return_token_strs:
        texts = await asyncio.to_thread(lambda: [text.tokenizer.token_text(token) for token in ids])
    answer = {"count": len(ids), "max_model_len": text.limits.max_model_len, "tokens": ids, "token_strs": texts}
    return Response(to_json(answer), media_type="application/json")


@router.post(
    "/detokenize", response_model=DetokenizeResponse, responses=_ERRORS, openapi_extra=json_body(DetokenizeRequest)
)
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens shown."""
    body = await read_body(request, DetokenizeRequest)
    frontend = frontend_of(request)
    frontend.check_model(body.model)
    return Response(to_json({"prompt": await frontend.decode(body.tokens)}), media_type="application/json")


def _prompt_of(body: TokenizeRequest) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        found = "neither" if body.prompt is None else "both"
        raise ServiceError("invalid_value", f"give either prompt or messages; the body holds {found}", param="prompt")
    of_messages = {name: value for name in OF_MESSAGES if (value := getattr(body, name)) is not None}
    if body.prompt is not None:
        if of_messages:
            name = next(iter(of_messages))
            raise ServiceError("invalid_value", f"{name} goes with messages, not with prompt", param=name)
        return body.prompt
    return conversation_of(ChatRequest.model_construct(messages=body.messages, **of_messages))

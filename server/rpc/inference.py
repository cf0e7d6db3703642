"""jaxserve.v1.Inference over a front end: messages in, messages out. `server.rpc.calls` does what is gRPC about it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceServicer
from server.errors import ServiceError
from server.frontend.frontend import CallOptions, Frontend, Prompt
from server.frontend.generation import Generation
from server.rpc import convert
from server.rpc.convert import Call

Answer = TypeVar("Answer", pb.GenerateResponse, pb.GenerateStreamResponse, pb.ChatResponse, pb.ChatStreamResponse)
Asked = pb.GenerateRequest | pb.GenerateStreamRequest | pb.ChatRequest | pb.ChatStreamRequest
OWNER = "jaxserve"


class Inference(InferenceServicer):
    """Every method takes (message, Call) and may raise anything; leaving it ends what it asked the engine for."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend

    async def Generate(self, message: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        return await self._whole(pb.GenerateResponse, message, convert.generate_prompt(message), call)

    def GenerateStream(
        self, message: pb.GenerateStreamRequest, call: Call
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        return self._pieces(pb.GenerateStreamResponse, message, convert.generate_prompt(message), call)

    async def Chat(self, message: pb.ChatRequest, call: Call) -> pb.ChatResponse:
        return await self._whole(pb.ChatResponse, message, convert.conversation(message, message.messages), call)

    def ChatStream(self, message: pb.ChatStreamRequest, call: Call) -> AsyncGenerator[pb.ChatStreamResponse, None]:
        prompt = convert.conversation(message, message.messages)
        return self._pieces(pb.ChatStreamResponse, message, prompt, call)

    async def Embed(self, message: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        name = self._frontend.check_model(message.model)
        raise ServiceError("unsupported_model", f"model {name!r} generates text; it gives no embeddings", param="model")

    async def Tokenize(self, message: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        self._frontend.check_model(message.model)
        prompt: Prompt
        if message.WhichOneof("prompt") == "messages":
            prompt = convert.conversation(message, message.messages.messages)
        else:
            prompt = convert.generate_prompt(message)
        add_special = message.add_special_tokens if message.HasField("add_special_tokens") else None
        options = CallOptions(endpoint=call.endpoint, add_special_tokens=add_special, client_request_id=call.request_id)
        _, ids = await self._frontend.encode(prompt, options)
        texts = await asyncio.to_thread(self._token_texts, ids) if message.return_token_strs else []
        return pb.TokenizeResponse(token_ids=ids, max_model_len=self._max_model_len(), token_strs=texts)

    async def Detokenize(self, message: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        self._frontend.check_model(message.model)
        return pb.DetokenizeResponse(text=convert.clean(await self._frontend.decode(list(message.token_ids))))

    async def ListModels(self, message: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._model(name) for name in self._frontend.model_names])

    async def GetModel(self, message: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._model(self._frontend.check_model(message.model)))

    async def Abort(self, message: pb.AbortRequest, call: Call) -> pb.AbortResponse:
        if not message.id:
            raise ServiceError("missing_required_parameter", "id is not set", param="id")
        self._frontend.abort(message.id)
        return pb.AbortResponse()

    async def _whole(self, kind: type[Answer], message: Asked, prompt: Prompt, call: Call) -> Answer:
        name, generation = await self._start(message, prompt, call)
        async with generation:
            [output] = await generation.outputs()
            params = generation.requests[0].params
            answer = _blank(kind, name, generation)
            answer.choices.extend(convert.choice(sample, params) for sample in output.outputs)
            if message.options.return_prompt_token_ids:
                answer.prompt_token_ids.extend(output.prompt_token_ids)
            _complete(answer, generation)
            return answer

    async def _pieces(
        self, kind: type[Answer], message: Asked, prompt: Prompt, call: Call
    ) -> AsyncGenerator[Answer, None]:
        """One message for all that is new since the last one was written."""
        name, generation = await self._start(message, prompt, call)
        async with generation:
            request = generation.requests[0]
            ids = request.prompt_token_ids if message.options.return_prompt_token_ids else []
            complete = False
            async for deltas in generation.deltas():
                answer = _blank(kind, name, generation)
                answer.choices.extend(convert.choices([delta for _, delta in deltas], request.params))
                answer.prompt_token_ids.extend(ids)
                ids = []
                if generation.finished:
                    _complete(answer, generation)
                    complete = True
                yield answer
            if not complete:  # a stop string was found, and that the engine ended there too came later
                answer = _blank(kind, name, generation)
                _complete(answer, generation)
                yield answer

    async def _start(self, message: Asked, prompt: Prompt, call: Call) -> tuple[str, Generation]:
        """(the name to answer with, the request running)"""
        name = self._frontend.check_model(message.model)
        options = convert.call_options(message.options, call)
        params = self._frontend.sampling_params(**convert.given_sampling(message.sampling))
        return name, await self._frontend.generate([prompt], params, options)

    def _model(self, name: str) -> pb.Model:
        return pb.Model(
            id=name,
            created=self._frontend.created,
            owned_by=OWNER,
            max_model_len=self._max_model_len(),
            root=self._frontend.model_root,
        )

    def _max_model_len(self) -> int:
        info = self._frontend.engine.info
        return 0 if info is None else info.limits.max_model_len

    def _token_texts(self, ids: Sequence[int]) -> list[str]:
        token_text = self._frontend.text.tokenizer.token_text
        return [convert.clean(token_text(token)) for token in ids]


def _blank(kind: type[Answer], name: str, generation: Generation) -> Answer:
    return kind(id=generation.requests[0].id, model=name, created=int(time.time()))


def _complete(answer: Answer, generation: Generation) -> None:
    """Adds what is known only at the end."""
    [output] = generation.current()
    answer.usage.CopyFrom(convert.usage(output))
    answer.timings.CopyFrom(convert.timings(output))
    answer.prompt_logprobs.extend(convert.prompt_logprobs(output, generation.requests[0].params))

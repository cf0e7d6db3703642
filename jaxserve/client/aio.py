"""The asyncio client: the same calls as `Client`, to be awaited."""

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from jaxserve.client import results
from jaxserve.client.channel import Tls, channel_options, credentials
from jaxserve.client.errors import server_error
from jaxserve.client.options import ChatOptions, Messages, Options, Prompt, Terms, TokenizeOptions
from jaxserve.client.requests import Requests
from jaxserve.client.results import Chunk, Completion, Model, Tokens
from jaxserve.request import SamplingParams
from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub


class AsyncClient:
    """As `Client`, for one event loop: `async with`, `await client.generate(...)`, `async for` over the streams.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     async for chunk in client.stream("Once upon a time", max_tokens=50):
    ...         print(chunk.text, end="", flush=True)

    Cancelling the task that awaits a call cancels the call.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: bool | Tls = False,
        timeout: float | None = None,
        model: str = "",
        max_attempts: int = 3,
    ):
        options = channel_options(tls, max_attempts)
        secure = credentials(tls)
        self._channel = (
            grpc.aio.secure_channel(target, secure, options) if secure else grpc.aio.insecure_channel(target, options)
        )
        self._stub = InferenceStub(self._channel)
        self._health = HealthStub(self._channel)
        self._requests = Requests(model=model, timeout=timeout, api_key=api_key)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the calls that still run."""
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Completion:
        """The answer to a text, to token ids, or to messages. What options name stands above params."""
        request = self._requests.generate(pb.GenerateRequest, prompt, params, options)
        return results.completion(await self._unary(self._stub.Generate, request, options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        """`generate` in pieces, as they come. Closing the generator (`aclose`) cancels the call."""
        request = self._requests.generate(pb.GenerateStreamRequest, prompt, params, options)
        return self._stream(self._stub.GenerateStream, request, options)

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Completion:
        """The next message of a conversation, through the model's chat template."""
        request = self._requests.chat(pb.ChatRequest, messages, params, options)
        return results.completion(await self._unary(self._stub.Chat, request, options))

    def chat_stream(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """`chat` in pieces, as they come. Closing the generator (`aclose`) cancels the call."""
        request = self._requests.chat(pb.ChatStreamRequest, messages, params, options)
        return self._stream(self._stub.ChatStream, request, options)

    async def tokenize(self, prompt: str | Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """The token ids the model would get."""
        request = self._requests.tokenize(prompt, options)
        return results.tokens(await self._unary(self._stub.Tokenize, request, options))

    async def detokenize(self, token_ids: Iterable[int], **terms: Unpack[Terms]) -> str:
        """The text of token ids, special tokens included."""
        request = self._requests.detokenize(token_ids, terms)
        return (await self._unary(self._stub.Detokenize, request, terms)).text

    async def models(self, **terms: Unpack[Terms]) -> list[Model]:
        """Every name the server's model goes by."""
        answer = await self._unary(self._stub.ListModels, pb.ListModelsRequest(), terms)
        return [results.model(model) for model in answer.models]

    async def model(self, **terms: Unpack[Terms]) -> Model:
        """The one that is asked for."""
        answer = await self._unary(self._stub.GetModel, self._requests.model_of(terms), terms)
        return results.model(answer.model)

    async def abort(self, id: str, **terms: Unpack[Terms]) -> None:
        """Ends a request, of any client, by its `Completion.id` or `Chunk.id`; one that is not running is ignored."""
        await self._unary(self._stub.Abort, pb.AbortRequest(id=id), terms)

    async def health(self, **terms: Unpack[Terms]) -> bool:
        """Whether the server is ready to generate. Needs no key."""
        answer = await self._unary(self._health.Check, health_pb2.HealthCheckRequest(), terms)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def _unary(self, method: Callable[..., Any], request: Any, terms: Terms) -> Any:
        try:
            return await method(request, **self._requests.terms(terms))
        except grpc.RpcError as error:
            raise server_error(error) from None

    async def _stream(self, method: Callable[..., Any], request: Any, terms: Terms) -> AsyncGenerator[Chunk, None]:
        call = method(request, **self._requests.terms(terms))
        try:
            async for message in call:
                yield results.chunk(message)
        except grpc.RpcError as error:
            raise server_error(error) from None
        finally:
            call.cancel()

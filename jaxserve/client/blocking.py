"""The blocking client. Each method is one call; see `jaxserve.client` for an example."""

from collections.abc import Callable, Generator, Iterable
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


class Client:
    """A connection to one server, opened by the first call. Threads may share it. Close it, or use it in a `with`.

    target        "host:port"
    api_key       sent with every call
    tls           False = plain text, True = the certificates this system trusts, or which ones
    timeout       seconds for a whole call, its stream included, of calls that name none; None = no limit
    model         asked for by calls that name none; "" = the one there is
    max_attempts  of a unary call while the server is unavailable; streams are never tried again

    Calls take the keyword arguments of `jaxserve.client.options` and raise ServerError.
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
            grpc.secure_channel(target, secure, options) if secure else grpc.insecure_channel(target, options)
        )
        self._stub = InferenceStub(self._channel)
        self._health = HealthStub(self._channel)
        self._requests = Requests(model=model, timeout=timeout, api_key=api_key)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls that still run."""
        self._channel.close()

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]) -> Completion:
        """The answer to a text, to token ids, or to messages. What options name stands above params."""
        request = self._requests.generate(pb.GenerateRequest, prompt, params, options)
        return results.completion(self._unary(self._stub.Generate, request, options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Generator[Chunk, None, None]:
        """`generate` in pieces, as they come. Closing the generator, or dropping it, cancels the call."""
        request = self._requests.generate(pb.GenerateStreamRequest, prompt, params, options)
        return self._stream(self._stub.GenerateStream, request, options)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Completion:
        """The next message of a conversation, through the model's chat template."""
        request = self._requests.chat(pb.ChatRequest, messages, params, options)
        return results.completion(self._unary(self._stub.Chat, request, options))

    def chat_stream(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Generator[Chunk, None, None]:
        """`chat` in pieces, as they come. Closing the generator, or dropping it, cancels the call."""
        request = self._requests.chat(pb.ChatStreamRequest, messages, params, options)
        return self._stream(self._stub.ChatStream, request, options)

    def tokenize(self, prompt: str | Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """The token ids the model would get."""
        request = self._requests.tokenize(prompt, options)
        return results.tokens(self._unary(self._stub.Tokenize, request, options))

    def detokenize(self, token_ids: Iterable[int], **terms: Unpack[Terms]) -> str:
        """The text of token ids, special tokens included."""
        request = self._requests.detokenize(token_ids, terms)
        return self._unary(self._stub.Detokenize, request, terms).text

    def models(self, **terms: Unpack[Terms]) -> list[Model]:
        """Every name the server's model goes by."""
        answer = self._unary(self._stub.ListModels, pb.ListModelsRequest(), terms)
        return [results.model(model) for model in answer.models]

    def model(self, **terms: Unpack[Terms]) -> Model:
        """The one that is asked for."""
        return results.model(self._unary(self._stub.GetModel, self._requests.model_of(terms), terms).model)

    def abort(self, id: str, **terms: Unpack[Terms]) -> None:
        """Ends a request, of any client, by its `Completion.id` or `Chunk.id`; one that is not running is ignored."""
        self._unary(self._stub.Abort, pb.AbortRequest(id=id), terms)

    def health(self, **terms: Unpack[Terms]) -> bool:
        """Whether the server is ready to generate. Needs no key."""
        answer = self._unary(self._health.Check, health_pb2.HealthCheckRequest(), terms)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def _unary(self, method: Callable[..., Any], request: Any, terms: Terms) -> Any:
        try:
            return method(request, **self._requests.terms(terms))
        except grpc.RpcError as error:
            raise server_error(error) from None

    def _stream(self, method: Callable[..., Any], request: Any, terms: Terms) -> Generator[Chunk, None, None]:
        call = method(request, **self._requests.terms(terms))
        try:
            for message in call:
                yield results.chunk(message)
        except grpc.RpcError as error:
            raise server_error(error) from None
        finally:
            call.cancel()

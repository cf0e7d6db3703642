"""A gRPC client of a jaxserve server, blocking and asyncio. Imports no JAX.

>>> from jaxserve.client import Client
>>> with Client("127.0.0.1:50051") as client:
...     print(client.generate("The capital of France is", temperature=0, max_tokens=8).text)
...     for chunk in client.chat_stream([{"role": "user", "content": "Tell me a story."}]):
...         print(chunk.text, end="", flush=True)

What the server refuses raises `ServerError`, what cannot even be sent `jaxserve.errors.InvalidRequestError`.
"""

from jaxserve.client.aio import AsyncClient
from jaxserve.client.blocking import Client
from jaxserve.client.channel import Tls
from jaxserve.client.errors import ServerError
from jaxserve.client.results import Chunk, Completion, Model, Timings, Tokens, Usage

__all__ = [
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "Model",
    "ServerError",
    "Timings",
    "Tls",
    "Tokens",
    "Usage",
]

"""A conversation with a server through jaxserve's gRPC client: a line in, its answer out as it comes, until Ctrl-D.

python examples/chat_grpc.py [127.0.0.1:50051]
"""

import sys
from collections.abc import Iterator

from jaxserve.client import Client


def lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def main() -> None:
    messages: list[dict[str, str]] = []
    with Client(*sys.argv[1:2]) as client:
        for line in lines():
            messages.append({"role": "user", "content": line})
            answer = ""
            for chunk in client.chat_stream(messages, temperature=0):
                print(chunk.text, end="", flush=True)
                answer += chunk.text
                if chunk.usage and chunk.timings:
                    print(f"\n[{chunk.usage.completion_tokens} tokens in {chunk.timings.total:.2f} s]")
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()

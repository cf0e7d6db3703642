"""A conversation with a server through OpenAI's client: a line in, its answer out while it is generated, until Ctrl-D.

python examples/chat_rest.py [http://127.0.0.1:8000/v1]
"""

import sys
from collections.abc import Iterator

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=address, api_key="none")
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    for line in lines():
        messages.append({"role": "user", "content": line})
        answer = ""
        for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()

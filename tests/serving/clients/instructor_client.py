"""instructor without a response model: plain chat through its patched client."""

import instructor
import openai
from harness import KEYED_REST, MESSAGES, MODEL, REST, main, raised
from openai import OpenAI

SETTINGS = {"api_key": "none", "max_retries": 0}
plain = OpenAI(base_url=f"{REST}/v1", **SETTINGS)
client = instructor.from_openai(plain, mode=instructor.Mode.MD_JSON)


def check_chat() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=None, temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content and answer.usage.completion_tokens > 0


def check_chat_stream_equals_chat() -> None:
    options = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    chunks = client.chat.completions.create(**options, response_model=None, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == plain.chat.completions.create(**options).choices[0].message.content


def check_parameters_pass_through() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_model=None,
        n=2,
        seed=3,
        temperature=1.0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=1,
    )
    assert len(answer.choices) == 2 and all(choice.logprobs.content for choice in answer.choices)


def check_errors() -> None:
    def ask(model: str) -> None:
        client.chat.completions.create(model=model, messages=MESSAGES, response_model=None)

    assert raised(openai.NotFoundError, lambda: ask("gpt-4o")).code == "model_not_found"
    keyed = instructor.from_openai(OpenAI(base_url=f"{KEYED_REST}/v1", **SETTINGS), mode=instructor.Mode.MD_JSON)
    raised(
        openai.AuthenticationError,
        lambda: keyed.chat.completions.create(model=MODEL, messages=MESSAGES, response_model=None),
    )


main(globals())

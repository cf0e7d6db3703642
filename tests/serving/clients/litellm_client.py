"""litellm, which routes by provider: "openai/…" for chat, "text-completion-openai/…" for completions."""

from typing import Any

import litellm
from harness import KEYED_REST, MESSAGES, MODEL, PROMPT, REST, main, raised

litellm.suppress_debug_info = True


def chat(**options: Any) -> Any:
    fixed = {"model": f"openai/{MODEL}", "api_base": f"{REST}/v1", "api_key": "none", "max_retries": 0}
    return litellm.completion(**{**fixed, "messages": MESSAGES, "temperature": 0, "max_tokens": 24, **options})


def text(**options: Any) -> Any:
    fixed = {"model": f"text-completion-openai/{MODEL}", "api_base": f"{REST}/v1", "api_key": "none"}
    return litellm.text_completion(**{**fixed, "prompt": PROMPT, "temperature": 0, "max_tokens": 24, **options})


def check_chat() -> None:
    answer = chat()
    assert answer.choices[0].message.content and answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.completion_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def check_chat_stream_equals_chat() -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(stream=True)]
    assert len(pieces) > 2 and "".join(pieces) == chat().choices[0].message.content


def check_chat_stream_usage() -> None:
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.total_tokens == chat().usage.total_tokens


def check_completion_stream_equals_completion() -> None:
    pieces = [chunk.choices[0].text or "" for chunk in text(stream=True)]
    assert "".join(pieces) == text().choices[0].text != ""


def check_logprobs_stop_and_n() -> None:
    answer = chat(logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert content and all(len(token.top_logprobs) == 2 for token in content)
    whole = answer.choices[0].message.content
    word = whole.split()[1]
    assert chat(stop=[word]).choices[0].message.content == whole[: whole.index(word)]
    assert len(chat(n=2, seed=3, temperature=1, max_tokens=8).choices) == 2


def check_errors() -> None:
    raised(litellm.NotFoundError, lambda: chat(model="openai/gpt-4o"))
    assert "temperature" in str(raised(litellm.BadRequestError, lambda: chat(temperature=9)))
    raised(litellm.AuthenticationError, lambda: chat(api_base=f"{KEYED_REST}/v1"))
    raised(litellm.ContextWindowExceededError, lambda: chat(messages=[{"role": "user", "content": "word " * 9000}]))


main(globals())

"""openai-python with strict response validation: what its types demand, and what it makes of errors."""

import asyncio
from typing import Any

import openai
from harness import KEY, KEYED_REST, MESSAGES, MODEL, PROMPT, REST, main, raised
from openai import AsyncOpenAI, OpenAI

SETTINGS: dict[str, Any] = {"base_url": f"{REST}/v1", "api_key": "none", "max_retries": 0, "timeout": 300}
client = OpenAI(**SETTINGS, _strict_response_validation=True)
# Strict types of completions want a finish_reason in every chunk, and a logprob of a prompt's first token: OpenAI's own
# answers have neither.
loose = OpenAI(**SETTINGS)


def chat(**options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 24, **options})


def completion(on: OpenAI = client, **options: Any) -> Any:
    return on.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 24, **options})


def texts_of(stream: Any) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            new = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (new or "")
    return texts


def check_models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def check_chat() -> None:
    answer = chat(temperature=0)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")
    assert answer.model == MODEL and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens > 0 and 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def check_chat_stream_equals_chat() -> None:
    whole = chat(temperature=0)
    chunks = list(chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert texts_of(chunks) == {0: whole.choices[0].message.content}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def check_completion() -> None:
    answer = completion(temperature=0)
    assert answer.choices[0].text and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.object == "text_completion" and answer.usage.completion_tokens > 0


def check_completion_stream_equals_completion() -> None:
    whole = completion(temperature=0)
    assert texts_of(completion(on=loose, temperature=0, stream=True)) == {0: whole.choices[0].text}


def check_async_streams_together() -> None:
    async def text(number: int) -> str:
        stream = await aio.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Count to {number}."}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_texts() -> list[str]:
        return await asyncio.gather(*map(text, range(2, 6)))

    aio = AsyncOpenAI(**SETTINGS, _strict_response_validation=True)
    together = asyncio.run(all_texts())
    for number, streamed in zip(range(2, 6), together, strict=True):
        messages = [{"role": "user", "content": f"Count to {number}."}]
        assert chat(messages=messages, temperature=0, max_tokens=16).choices[0].message.content == streamed


def check_chat_logprobs() -> None:
    answer = chat(temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.token == token.top_logprobs[0].token, "greedy takes the likeliest"
    read = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert read.startswith(answer.choices[0].message.content)
    streamed = [
        token.logprob
        for chunk in chat(temperature=0, logprobs=True, top_logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert len(streamed) == len(content)
    assert all(abs(new - token.logprob) < 1e-3 for new, token in zip(streamed, content, strict=True))


def check_completion_logprobs() -> None:
    answer = completion(temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert all(len(top) == 2 for top in logprobs.top_logprobs), "greedy: the chosen token is one of the likeliest"
    echoed = completion(on=loose, temperature=0, logprobs=2, echo=True)
    assert echoed.choices[0].text == PROMPT + answer.choices[0].text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert echoed.choices[0].logprobs.tokens[-len(logprobs.tokens) :] == logprobs.tokens


def check_stop_string_ends_the_text_before_it() -> None:
    whole = completion(temperature=0).choices[0].text
    stop = whole.split()[4]
    answer = completion(temperature=0, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert texts_of(completion(on=loose, temperature=0, stop=stop, stream=True)) == {0: answer.choices[0].text}


def check_n_choices_by_seed() -> None:
    options = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12}
    whole = {choice.index: choice.message.content for choice in chat(**options).choices}
    assert len(whole) == 3 and len(set(whole.values())) > 1, "samples of one seed differ among each other"
    assert texts_of(chat(**options, stream=True)) == whole


def check_prompts_as_lists_and_ids() -> None:
    answer = completion(prompt=[PROMPT, "Two plus two is"], temperature=0, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    ids = completion(prompt=[100, 200, 300], temperature=0, max_tokens=4)
    assert ids.usage.prompt_tokens == 3 and ids.usage.completion_tokens == 4


def check_every_standard_parameter_is_taken() -> None:
    answer = chat(
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"100": -100},
        seed=1,
        stop=["\n\n"],
        n=1,
        user="somebody",
        store=False,
        metadata={"for": "test"},
        service_tier="auto",
        parallel_tool_calls=False,
        response_format={"type": "text"},
        max_completion_tokens=24,
        modalities=["text"],
    )
    assert answer.choices[0].message.content is not None


def check_closing_a_stream_early_is_no_error() -> None:
    stream = chat(max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert chat(max_tokens=1).choices


def check_bad_request() -> None:
    error = raised(openai.BadRequestError, lambda: chat(temperature=7))
    assert (error.code, error.param, error.type) == ("invalid_value", "temperature", "invalid_request_error")
    error = raised(openai.BadRequestError, lambda: chat(extra_body={"max_tokns": 3}))
    assert (error.code, error.param) == ("unknown_parameter", "max_tokns") and "max_tokens" in error.message
    error = raised(openai.BadRequestError, lambda: completion(prompt="word " * 9000))
    assert error.code == "context_length_exceeded" and "8192" in error.message
    error = raised(openai.BadRequestError, lambda: chat(messages=[]))
    assert (error.code, error.param) == ("empty_prompt", "messages")
    error = raised(openai.BadRequestError, lambda: client.embeddings.create(model=MODEL, input="text"))
    assert error.code == "unsupported_model"


def check_bad_request_of_a_stream() -> None:
    error = raised(openai.BadRequestError, lambda: chat(stream=True, top_logprobs=2))
    assert error.param == "top_logprobs" and error.response.headers["x-request-id"] == error.request_id


def check_unknown_model_is_not_found() -> None:
    error = raised(openai.NotFoundError, lambda: chat(model="gpt-4o"))
    assert error.code == "model_not_found" and MODEL in error.message
    raised(openai.NotFoundError, lambda: client.models.retrieve("gpt-4o"))


def check_deadline_in_a_stream_raises_with_its_code() -> None:
    def read() -> None:
        stream = chat(
            stream=True, max_tokens=4000, extra_headers={"X-Request-Timeout": "1"}, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            pass

    error = raised(openai.APIError, read)
    assert error.code == "deadline_exceeded"


def check_authentication() -> None:
    wrong = OpenAI(base_url=f"{KEYED_REST}/v1", api_key="wrong", max_retries=0)
    error = raised(openai.AuthenticationError, lambda: wrong.models.list())
    assert error.code == "invalid_api_key"
    right = OpenAI(base_url=f"{KEYED_REST}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True)
    assert right.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2).choices


main(globals())

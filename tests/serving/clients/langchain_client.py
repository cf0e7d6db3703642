"""langchain-openai: ChatOpenAI and OpenAI (completions), whole and streamed."""

import openai
from harness import KEYED_REST, MODEL, PROMPT, REST, main, raised
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

SETTINGS = {"base_url": f"{REST}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_retries": 0}
MESSAGES = [SystemMessage("You are brief."), HumanMessage("Name three colours of the rainbow.")]


def check_chat() -> None:
    answer = ChatOpenAI(**SETTINGS, max_tokens=24).invoke(MESSAGES)
    assert answer.content
    usage = answer.usage_metadata
    assert usage["output_tokens"] > 0 and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == MODEL


def check_chat_stream_equals_chat() -> None:
    model = ChatOpenAI(**SETTINGS, max_tokens=24, stream_usage=True)
    chunks = list(model.stream(MESSAGES))
    together = sum(chunks[1:], start=chunks[0])
    whole = model.invoke(MESSAGES)
    assert len(chunks) > 2 and together.content == whole.content
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert together.usage_metadata[name] == whole.usage_metadata[name]


def check_batch_answers_in_order() -> None:
    model = ChatOpenAI(**SETTINGS, max_tokens=8)
    questions = [f"Spell the number {number}." for number in range(4)]
    assert [a.content for a in model.batch(questions)] == [model.invoke(question).content for question in questions]


def check_completion_stream_equals_completion() -> None:
    model = OpenAI(**SETTINGS, max_tokens=24)
    pieces = list(model.stream(PROMPT))
    assert len(pieces) > 2 and "".join(pieces) == model.invoke(PROMPT) != ""


def check_logprobs_stop_and_n() -> None:
    model = ChatOpenAI(**SETTINGS, max_tokens=12, logprobs=True, top_logprobs=2)
    answer = model.invoke(MESSAGES)
    content = answer.response_metadata["logprobs"]["content"]
    assert content and all(len(token["top_logprobs"]) == 2 for token in content)
    word = answer.content.split()[1]
    assert model.invoke(MESSAGES, stop=[word]).content == answer.content[: answer.content.index(word)]
    several = ChatOpenAI(**{**SETTINGS, "temperature": 1}, max_tokens=8, n=2, seed=3).generate([MESSAGES])
    assert len(several.generations[0]) == 2


def check_errors() -> None:
    model = ChatOpenAI(**{**SETTINGS, "model": "gpt-4o"})
    assert raised(openai.NotFoundError, lambda: model.invoke(MESSAGES)).code == "model_not_found"
    model = ChatOpenAI(**{**SETTINGS, "temperature": 9})
    assert raised(openai.BadRequestError, lambda: model.invoke(MESSAGES)).param == "temperature"
    model = ChatOpenAI(**{**SETTINGS, "base_url": f"{KEYED_REST}/v1"})
    raised(openai.AuthenticationError, lambda: model.invoke(MESSAGES))


main(globals())

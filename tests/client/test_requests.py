"""What cannot be sent is refused by name before it is sent; what can is sent as it was given."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from jaxserve.client import AsyncClient, Client
from jaxserve.client.options import ChatOptions, Options, SamplingOptions
from jaxserve.client.requests import Requests
from jaxserve.errors import InvalidRequestError
from jaxserve.request import SamplingParams
from jaxserve.v1 import inference_pb2 as pb

REQUESTS = Requests(model="mine", timeout=3.0, api_key=None)
USER = [{"role": "user", "content": "Hello"}]


def test_import_loads_no_jax() -> None:
    unwanted = {"jax", "flax", "transformers", "numpy"}
    script = f"import sys, jaxserve.client\nsys.exit(' '.join({unwanted} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_every_sampling_parameter_can_be_given() -> None:
    assert SamplingOptions.__annotations__.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


def test_every_option_of_the_protocol_can_be_given() -> None:
    assert set(pb.RequestOptions.DESCRIPTOR.fields_by_name) <= Options.__annotations__.keys()
    chat = set(pb.ChatRequest.DESCRIPTOR.fields_by_name) - {"model", "messages", "sampling", "options"}
    assert ChatOptions.__annotations__.keys() - Options.__annotations__.keys() == chat


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"temperature": 9}, "temperature"),
        ("x", {"n": 0}, "n"),
        ("x", {"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ("x", {"stop": [""]}, "stop"),
        ("x", {"max_tokens": 2**40}, "max_tokens"),
        ("x", {"logit_bias": {2**40: 1}}, "logit_bias"),
        ("x", {"allowed_token_ids": [2**40]}, "allowed_token_ids"),
        ("x", {"seed": 2**63}, "seed"),
        ("x", {"priority": 2**40}, "priority"),
        ("x", {"priority": "high"}, "priority"),
        ("x", {"truncation_side": "top"}, "truncation_side"),
        ("x", {"temprature": 1}, "temprature"),
        ("x", {"model": 3}, "model"),
        ("a\ud800", {}, "text"),
        ([1, -1], {}, "token_ids"),
        ([2**32], {}, "token_ids"),
        ([1, "a"], {}, "token_ids"),
        (None, {}, "prompt"),
        (b"bytes", {}, "prompt"),
        ({"role": "user"}, {}, "prompt"),
        ([{"role": "user", "text": "a"}], {}, "messages"),
        ([{"role": "user", "content": "a"}, "b"], {}, "messages"),
        ([{"role": "user", "content": 3}], {}, "content"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        REQUESTS.generate(pb.GenerateRequest, prompt, None, options)
    assert raised.value.field == field
    assert field in str(raised.value)


def test_refusal_comes_with_the_call_and_not_with_the_first_chunk() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError):
        client.stream("x", temperature=9)


def test_min_tokens_needs_no_max_tokens() -> None:
    message = REQUESTS.generate(pb.GenerateRequest, "x", None, {"min_tokens": 100})
    assert message.sampling == pb.SamplingParams(min_tokens=100)


def test_options_stand_above_params() -> None:
    params = SamplingParams(temperature=0.5, max_tokens=9, stop="a")
    message = REQUESTS.generate(pb.GenerateRequest, "x", params, {"temperature": 0, "stop": None})
    assert (message.sampling.temperature, message.sampling.max_tokens, list(message.sampling.stop)) == (0, 9, [])


@pytest.mark.parametrize("ids", [(1, 2), range(1, 3), [1, 2], iter([1, 2])])
def test_any_iterable_of_ids_is_a_prompt(ids: Any) -> None:
    assert REQUESTS.generate(pb.GenerateRequest, ids, None, {}).token_ids == pb.TokenIds(ids=[1, 2])


def test_chat_variables_are_sent_apart() -> None:
    message = REQUESTS.chat(
        pb.ChatRequest, USER, None, {"chat_template_kwargs": {"a": [1]}, "add_generation_prompt": False, "n": 2}
    )
    assert message.HasField("add_generation_prompt") and not message.add_generation_prompt
    assert not message.HasField("continue_final_message")
    assert message.chat_template_kwargs["a"][0] == 1
    assert message.sampling == pb.SamplingParams(n=2)


def test_model_of_a_call_stands_above_the_clients() -> None:
    assert REQUESTS.generate(pb.GenerateRequest, "x", None, {}).model == "mine"
    assert REQUESTS.generate(pb.GenerateRequest, "x", None, {"model": "other"}).model == "other"
    assert REQUESTS.model_of({"model": ""}).model == ""


def test_timeout_of_a_call_stands_above_the_clients() -> None:
    assert REQUESTS.terms({})["timeout"] == 3.0
    assert REQUESTS.terms({"timeout": None})["timeout"] is None
    assert REQUESTS.terms({"timeout": 1.0})["timeout"] == 1.0


def test_key_and_request_id_are_sent_as_metadata() -> None:
    requests = Requests(model="", timeout=None, api_key="k")
    assert requests.terms({"request_id": "i"})["metadata"] == (("authorization", "Bearer k"), ("x-request-id", "i"))
    assert REQUESTS.terms({})["metadata"] == ()

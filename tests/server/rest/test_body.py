"""What a body may be, and what is said of one that may not: the checks every POST route shares."""

import contextlib
import gzip
import http.client
import json
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.errors import ServiceError
from server.rest import body as body_module
from server.rest import connection
from server.rest.body import parse_json

JSON = {"Content-Type": "application/json"}
HALF_A_BODY = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"


def refused(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Checks an error body, and returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert len(error["message"]) < 500
    return error["message"]


def post(live: Any, content: bytes | str, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    return httpx.post(live.rest + path, content=content, headers={**JSON, **headers})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"prompt": "a"} x',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\x00"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"[" * 2_000_000,
        b"[" + b"{}," * 2**15 + b"{}]",
    ],
    ids=[
        "empty",
        "cut off",
        "single quotes",
        "trailing",
        "bad UTF-8",
        "lone surrogate",
        "control character",
        "byte order mark",
        "UTF-16",
        "5000 lists",
        "5000 objects",
        "2 million brackets",
        "too many objects",
    ],
)
def test_what_is_not_json_gets_400_invalid_json(live: Any, body: bytes) -> None:
    refused(post(live, body), 400, "invalid_json")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"prompt": "a", "temperature": NaN}', "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature"),
        ('{"prompt": "a", "top_p": -Infinity}', "top_p"),
        ('{"prompt": "a", "logit_bias": {"5": Infinity}}', "logit_bias.5"),
        ('{"prompt": [1, 1e400]}', "prompt[1]"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "seed"),
        ('{"prompt": [[1, 2], [3, ' + "9" * 5000 + "]]}", "prompt[1][1]"),
        ('{"prompt": "a", "n": 18446744073709551616}', "n"),
        ('{"prompt": "a", "n": -9223372036854775809}', "n"),
        ('{"prompt": [1, 18446744073709551616]}', "prompt[1]"),
        ("1e999", None),
    ],
)
def test_a_number_no_field_can_hold_gets_400_and_its_name(live: Any, body: str, param: str | None) -> None:
    refused(post(live, body), 400, "invalid_value", param)


def test_numbers_a_field_can_hold_are_left_as_they_are() -> None:
    numbers = [0, -(2**63), 2**64 - 1, 1e308, 5e-324, 0.1, True, None]
    assert parse_json(json.dumps(numbers).encode()) == numbers
    assert parse_json(json.dumps([1, 2, 2**64 - 1]).encode()) == [1, 2, 2**64 - 1]


def test_brackets_in_text_are_no_lists() -> None:
    text = '[{"\\\\' * 2**15
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    with pytest.raises(ServiceError, match="EOF"):
        parse_json(json.dumps({"prompt": text}).encode()[:-3])


def test_of_equal_keys_the_last_counts() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}


def test_a_long_integer_does_not_hide_that_the_rest_is_not_json() -> None:
    with pytest.raises(ServiceError) as caught:
        parse_json(b'{"seed": ' + b"9" * 5000 + b", oops}")
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("body", ["[]", "1", '"text"', "null", "true"])
def test_a_body_that_is_no_object_gets_400(live: Any, body: str) -> None:
    assert "JSON object" in refused(post(live, body), 400, "invalid_value")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/json; charset=utf-8; charset=utf-16",
        "application/jsonp",
        "",
        "é",
    ],
)
def test_another_content_type_gets_415(live: Any, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
    answer = httpx.post(live.rest + "/tokenize", content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in refused(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"', "application/json;"],
)
def test_json_by_any_spelling_of_its_type_is_read(live: Any, content_type: str) -> None:
    answer = post(live, '{"prompt": "a"}', "/tokenize", **{"Content-Type": content_type})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "zstd"])
def test_a_compressed_body_gets_415_and_is_not_unpacked(live: Any, encoding: str) -> None:
    answer = post(live, gzip.compress(b'{"prompt": "a"}'), "/tokenize", **{"Content-Encoding": encoding})
    assert "Content-Encoding" in refused(answer, 415, "unsupported_media_type")
    assert post(live, '{"prompt": "a"}', "/tokenize", **{"Content-Encoding": "identity"}).status_code == 200


def test_a_body_declared_too_large_is_refused_before_any_of_it_is_sent(live: Any) -> None:
    host, port = live.rest.removeprefix("http://").split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=30)
    client.putrequest("POST", "/v1/completions")
    for name, value in {**JSON, "Content-Length": str(live.settings.max_body_bytes + 1)}.items():
        client.putheader(name, value)
    client.endheaders()
    answer = client.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "payload_too_large"
    client.close()


def test_a_chunked_body_without_end_is_refused_and_cut_off(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER", 0.2)

    def endless() -> Any:
        while True:
            yield b" " * 65536

    # A client that only writes never sees its answer, only the end of the connection.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        refused(httpx.post(live.rest + "/v1/completions", content=endless(), headers=JSON), 413, "payload_too_large")
    live.until(lambda: not live._servers._http[0].state.tasks)


def test_a_chunked_body_that_goes_too_far_is_told_so(live: Any) -> None:
    chunks = (b" " * 65536 for _ in range(live.settings.max_body_bytes // 65536 + 2))
    refused(httpx.post(live.rest + "/v1/completions", content=chunks, headers=JSON), 413, "payload_too_large")


@pytest.mark.parametrize("kept", [True, False], ids=["keep-alive", "close"])
def test_a_client_that_sends_everything_first_reads_why_it_was_refused(live: Any, kept: bool) -> None:
    content = b" " * (live.settings.max_body_bytes * 2)
    if kept:
        refused(post(live, content), 413, "payload_too_large")
        return
    request = urllib.request.Request(live.rest + "/v1/completions", data=content, headers=JSON)
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.build_opener().open(request):
        pass
    with caught.value as error:
        assert error.code == 413 and json.loads(error.read())["error"]["code"] == "payload_too_large"


def test_a_body_of_exactly_the_limit_is_read(live: Any) -> None:
    body = b'{"prompt": "a"}'
    answer = post(live, body + b" " * (live.settings.max_body_bytes - len(body)), "/tokenize")
    assert answer.status_code == 200


def test_a_body_that_does_not_come_gets_408(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT", 0.2)
    host, port = live.rest.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as sock:
        sock.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read())["error"]["code"] == "request_timeout"


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(
    live: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = live.rest.removeprefix("http://").split(":")
    tasks = live._servers._http[0].state.tasks
    live.until(lambda: not tasks)
    with socket.create_connection((host, int(port)), 30) as sock:
        sock.sendall(HALF_A_BODY)
        live.until(lambda: tasks)
    live.until(lambda: not tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("field", "near"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topk", "top_k"), ("xyzzyx", None)],
)
def test_an_unknown_field_is_named_and_so_is_the_nearest_known_one(live: Any, field: str, near: str | None) -> None:
    message = refused(post(live, json.dumps({"prompt": "a", field: 1})), 400, "unknown_parameter", field)
    assert ("did you mean" in message) == (near is not None)
    assert near is None or near in message


def test_an_unknown_field_further_in_has_its_whole_path(live: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "contnet": "a"}]}
    answer = post(live, json.dumps(body), "/v1/chat/completions")
    assert "content" in refused(answer, 400, "unknown_parameter", "messages[1].contnet")


def test_with_warn_unknown_fields_are_dropped_and_logged(
    start_live: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    live = start_live(unknown_params="warn")
    messages = [{"role": "user", "content": "a", "mood": "good"}] * 3
    body = {"messages": messages, "max_tokens": 1, "line\nbreak": 1}
    answer = post(live, json.dumps(body), "/v1/chat/completions", **{"X-Request-Id": "of-this-test"})
    assert answer.status_code == 200, answer.text
    lines = [record.getMessage() for record in caplog.records if "of-this-test" in record.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert all(name in lines[0] for name in ("messages[0].mood", "messages[2].mood", "line\\nbreak"))


def test_a_missing_field_is_named(live: Any) -> None:
    refused(post(live, "{}"), 400, "missing_required_parameter", "prompt")
    answer = post(live, '{"messages": [{"content": "a"}]}', "/v1/chat/completions")
    refused(answer, 400, "missing_required_parameter", "messages[0].role")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]"),
        ({"logit_bias": {"5": "a"}}, "logit_bias"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_what_it_held(live: Any, fields: dict[str, Any], param: str) -> None:
    message = refused(post(live, json.dumps({"prompt": "a", **fields})), 400, "invalid_value", param)
    assert message.startswith(f"{param}=") and "must be" in message


def test_a_large_wrong_value_is_not_sent_back(live: Any) -> None:
    answer = post(live, json.dumps({"prompt": "a", "temperature": "x" * 3_000_000}))
    assert "xxx" in refused(answer, 400, "invalid_value", "temperature")


def test_a_long_unknown_name_is_not_sent_back(live: Any) -> None:
    answer = post(live, json.dumps({"prompt": "a", "x" * 3_000_000: 1}))
    assert answer.status_code == 400 and len(answer.content) < 1000

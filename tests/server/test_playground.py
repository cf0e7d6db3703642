"""The playground in headless Chromium against a real server: what a person sees is what the API answered."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.browser

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
AWKWARD = 'it\'s "quoted" \\n \\ $HOME `no` %s\n{日本語} 😀'  # for shells, JSON and Python alike
PATIENCE = 30_000  # ms, for machines that are busy


def _unavailable(reason: str) -> None:
    if os.environ.get("JAXSERVE_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from importlib import import_module

        sync_api = import_module("playwright.sync_api")
    except ImportError:
        _unavailable("playwright is not installed: pip install 'jaxserve[browser]'")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        _unavailable(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """visit(url): a page in a context of its own. In the end nothing was complained about, and no one else asked.

    refused: the browser may note responses with an error status. clock: time passes when `page.clock` says so.
    """
    contexts, troubles, refusals = [], [], []

    def open_page(url: str, *, refused: bool = False, clock: bool = False, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 850}, **options})
        context.set_default_timeout(PATIENCE)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: None if request.url.startswith((url, "data:")) else note(request.url))
        refusals.append(refused)
        if clock:
            page.clock.install()
        page.goto(url)
        return page

    def note(text: str) -> None:
        if not (any(refusals) and text.startswith("Failed to load resource")):
            troubles.append(text)

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def gate(live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """gate.let(n): the engine may do n steps more, and waits before the next; in the end it may do what it likes."""
    core = live.llm._loop.core
    step, allowed, free = core.step, threading.Semaphore(0), threading.Event()

    def gated_step() -> Any:
        while not (free.is_set() or allowed.acquire(timeout=0.05)):
            pass
        return step()

    monkeypatch.setattr(core, "step", gated_step)
    yield SimpleNamespace(let=allowed.release, open=free.set)
    free.set()
    live.assert_idle()


def setting(page: Any, **values: Any) -> None:
    for folded in page.locator("#settings details").all():
        folded.evaluate("details => { details.open = true; }")
    for name, value in values.items():
        page.locator(f"#c-{name}").fill(str(value))


def send(page: Any, text: str) -> Any:
    """Sends it by the keyboard; the last exchange of the conversation."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Control+Enter")
    return page.locator(".turn").last


def finished(turn: Any) -> Any:
    turn.locator(".answer[aria-busy=false]").wait_for(state="attached")
    turn.locator(".deeds").wait_for()
    return turn


def copied(turn: Any) -> str:
    turn.get_by_role("button", name="Copy").click()
    turn.get_by_role("button", name="Copied").wait_for()
    return turn.page.evaluate("navigator.clipboard.readText()")


def choose(page: Any, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check()


def chat(live: Any, content: str, **given: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], **given}
    return httpx.post(f"{live.rest}/v1/chat/completions", json=body, timeout=60).json()


def canned(page: Any, *events: Any, end: str = "data: [DONE]\n\n") -> None:
    """The next answers of the server are these events, whatever is asked."""
    body = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + end
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def test_first_screen_names_the_model_and_an_example_can_be_sent(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    page.get_by_role("heading", name=f"Ask {live.model}").wait_for()
    assert page.locator(".examples button").count() == 3
    assert page.locator("#c-temperature").get_attribute("placeholder") == "0.7"  # the model's own
    page.locator(".examples button").first.click()
    turn = finished(page.locator(".turn"))
    assert turn.locator(".trouble").count() == 0
    assert turn.locator(".answer").inner_text()


def test_chips_are_the_tokens_and_logprobs_the_api_answers(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    setting(page, temperature=0, max_tokens=40, top_logprobs=4)
    turn = finished(send(page, "The quick brown fox"))
    told = chat(live, "The quick brown fox", temperature=0, max_tokens=40, logprobs=True, top_logprobs=4)
    choice, usage = told["choices"][0], told["usage"]
    assert copied(turn) == choice["message"]["content"]
    entries = choice["logprobs"]["content"]
    chips = turn.locator(".answer .t")
    assert chips.count() == len(entries) == usage["completion_tokens"]
    text = turn.locator(".answer").evaluate("node => node.textContent")
    assert text.replace("\ufffd", "").startswith(choice["message"]["content"].replace("\ufffd", ""))
    facts = turn.locator(".facts").inner_text()
    assert f"{usage['prompt_tokens']} in the prompt" in facts
    assert f"{usage['completion_tokens']} tokens" in facts
    assert re.search(r"\d+ ms to first token|\d+\.\d+ s to first token", facts)
    assert re.search(r"\d+\.\d tokens/s", facts)

    tip = page.get_by_role("tooltip")
    chips.nth(3).hover()
    assert tip.locator("li").count() in (4, 5)  # the chosen one is a row of its own where it is not among the four
    shown = f"{entries[3]['logprob']:.3f}".replace("-", "\u2212")
    assert f"log probability {shown}" in tip.inner_text()
    page.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    chips.first.focus()
    page.keyboard.press("ArrowRight")
    assert chips.nth(1).get_attribute("aria-describedby") == tip.get_attribute("id")
    assert f"{entries[1]['logprob']:.3f}".lstrip("-") in tip.inner_text()
    page.keyboard.press("Escape")
    tip.wait_for(state="hidden")


def test_tokens_are_seen_before_the_answer_is_complete(live: Any, visit: Any, gate: SimpleNamespace) -> None:
    page = visit(live.rest)
    setting(page, temperature=0, max_tokens=30)
    turn = send(page, "The quick brown fox")
    gate.let(10)
    turn.locator(".answer[aria-busy=true] .t").nth(4).wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    page.get_by_text("1 of 4").wait_for()  # slots of the batch
    assert page.locator("#batch i.on").count() == 1
    assert int(page.locator("#pages").get_attribute("aria-valuenow")) > 0
    gate.open()
    finished(turn)
    page.get_by_text("0 of 4").wait_for()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_request_in_the_engine(live: Any, visit: Any, gate: SimpleNamespace, how: str) -> None:
    generated = live.frontend.engine.status.stats.generated_tokens
    page = visit(live.rest)
    setting(page, temperature=0, max_tokens=200)
    turn = send(page, "The quick brown fox")
    gate.let(10)
    turn.locator(".answer[aria-busy=true] .t").nth(2).wait_for()
    assert live.frontend.engine.status.open_samples == 1
    page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
    finished(turn)
    assert "stopped" in turn.locator(".facts").inner_text()
    live.until(lambda: not live.frontend.open_calls)
    gate.open()
    live.assert_idle()
    assert live.frontend.engine.status.stats.generated_tokens - generated <= 13
    assert page.get_by_role("button", name="Send").is_visible()


def test_completion_goes_on_with_the_text_as_it_is(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    choose(page, "Completion")
    setting(page, temperature=0, max_tokens=12)
    turn = finished(send(page, "The quick 日本語"))
    body = {"prompt": "The quick 日本語", "temperature": 0, "max_tokens": 12}
    text = httpx.post(f"{live.rest}/v1/completions", json=body).json()["choices"][0]["text"]
    assert copied(turn) == text
    assert turn.locator(".given").inner_text() == "The quick 日本語"
    assert turn.locator(".answer .t").count() == 12
    with page.expect_request("**/v1/completions") as asked:
        turn.get_by_role("button", name="Continue").click()
    assert asked.value.post_data_json["prompt"] == "The quick 日本語" + text
    finished(page.locator(".turn").nth(1))
    choose(page, "Chat")
    assert page.locator(".turn").count() == 0


def test_every_setting_reaches_the_request(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    numbers = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.02,
        "max_tokens": 3,
        "seed": 11,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "top_logprobs": 2,
    }
    setting(page, **numbers)
    page.locator("#system").fill("Be brief.")
    page.locator("#stops").fill("zz\\n\nq q")
    with page.expect_request("**/v1/chat/completions") as asked:
        turn = send(page, "Hello")
    finished(turn)
    assert turn.locator(".trouble").count() == 0, turn.inner_text()
    assert asked.value.post_data_json == {
        "model": live.model,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        **numbers,
        "logprobs": True,
        "stop": ["zz\n", "q q"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    page.reload()
    assert page.locator("#c-top_k").input_value() == "7"
    page.get_by_role("button", name="Reset").click()
    page.locator("#logprobs").uncheck()
    with page.expect_request("**/v1/chat/completions") as asked:
        turn = send(page, "Hello")
    assert asked.value.post_data_json.keys() == {"model", "messages", "max_tokens", "stream", "stream_options"}
    finished(turn)
    assert turn.locator(".t").count() == 0
    assert copied(turn)


def test_conversation_can_be_regenerated_edited_deleted_and_reset(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    setting(page, temperature=0, max_tokens=5)
    first = copied(finished(send(page, "One")))
    with page.expect_request("**/v1/chat/completions") as asked:
        turn = send(page, "Two")
    told = [{"role": "user", "content": "One"}, {"role": "assistant", "content": first}]
    assert asked.value.post_data_json["messages"] == [*told, {"role": "user", "content": "Two"}]
    finished(turn)
    with page.expect_request("**/v1/chat/completions") as asked:
        turn.get_by_role("button", name="Regenerate").click()
    assert asked.value.post_data_json["messages"][-1]["content"] == "Two"
    assert len(asked.value.post_data_json["messages"]) == 3
    finished(turn).get_by_role("button", name="Delete").click()
    assert page.locator(".turn").count() == 1
    page.get_by_role("button", name="Edit this message").click()
    assert page.locator("#prompt").input_value() == "One"
    assert page.locator(".turn").count() == 0
    finished(send(page, "Three"))
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    page.get_by_role("heading", name="Ask").wait_for()


def test_what_the_server_refuses_is_said_in_its_words_and_not_asked_again(live: Any, visit: Any) -> None:
    page = visit(live.rest, refused=True)
    long = "fox " * 300
    turn = finished(send(page, long))
    error = chat(live, long)["error"]
    alert = turn.get_by_role("alert").inner_text()
    assert "The server refused this request" in alert
    assert error["message"] in alert
    assert "HTTP 400" in alert and "context_length_exceeded" in alert
    with page.expect_request("**/v1/chat/completions") as asked:
        turn = send(page, "Hello")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "Hello"}]
    assert finished(turn).get_by_role("alert").count() == 0


def test_setting_out_of_range_is_told_before_anything_is_sent(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    setting(page, temperature=5)
    page.route("**/v1/chat/completions", lambda route: route.abort())  # which would show
    send(page, "Hello")
    page.get_by_text("Temperature is from 0 to 2").wait_for()
    assert page.locator("#c-temperature").get_attribute("aria-invalid") == "true"
    assert page.locator(".turn").count() == 0
    assert page.locator("#prompt").input_value() == "Hello"


@pytest.mark.parametrize(
    ("events", "end", "words"),
    [
        ([{"error": {"message": "it broke", "code": "engine_dead", "param": None}}], "data: [DONE]\n\n", "it broke"),
        ([], "", "The connection ended before the answer did"),
        ([], "data: {nonsense\n\n", "not JSON"),
    ],
    ids=["error event", "connection lost", "not JSON"],
)
def test_answer_that_breaks_off_keeps_its_text_and_says_why(
    live: Any, visit: Any, events: list[Any], end: str, words: str
) -> None:
    page = visit(live.rest)
    canned(page, delta("so far"), *events, end=end)
    turn = finished(send(page, "Hello"))
    assert "The answer was cut off" in turn.get_by_role("alert").inner_text()
    assert words in turn.get_by_role("alert").inner_text()
    assert turn.locator(".answer").inner_text() == "so far"
    assert turn.get_by_role("button", name="Try again").is_visible()


def test_server_that_is_gone_is_told(live: Any, visit: Any) -> None:
    page = visit(live.rest, refused=True)
    page.route("**/v1/**", lambda route: route.abort())
    turn = finished(send(page, "Hello"))
    assert "No connection to the server" in turn.get_by_role("alert").inner_text()
    page.get_by_text("no connection", exact=True).wait_for()


def test_text_of_a_model_is_never_html(live: Any, visit: Any) -> None:
    page = visit(live.rest)
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    canned(page, delta(hostile))
    turn = finished(send(page, hostile))
    assert turn.locator(".answer").inner_text() == turn.locator(".asked p").inner_text() == hostile
    assert turn.locator("img, script").count() == 0


def test_characters_of_several_tokens_are_shown_whole(live: Any, visit: Any) -> None:
    page = visit(live.rest)

    def token(raw: bytes, text: str) -> dict[str, Any]:
        entry = {"token": raw.decode(errors="replace"), "logprob": -0.5, "bytes": list(raw)}
        chunk = delta(text)
        chunk["choices"][0]["logprobs"] = {"content": [entry | {"top_logprobs": [entry]}]}
        return chunk

    first, second = "😀".encode()[:2], "😀".encode()[2:]
    canned(page, token(b"Hi", "Hi"), token(b" " + first, " "), token(second, "😀"), token(b"!", "!"))
    turn = finished(send(page, "Hello"))
    assert turn.locator(".answer").evaluate("node => node.textContent") == "Hi 😀!"
    assert turn.locator(".answer .t").count() == 4
    turn.locator(".t").nth(2).hover()
    assert "98 80" in page.get_by_role("tooltip").inner_text()


def code_for(page: Any, language: str) -> str:
    page.get_by_role("button", name="Code for this request").click()
    choose(page, language)
    snippet = page.locator("#snippet").text_content()
    page.locator("#snippet-copy").click()
    while page.evaluate("navigator.clipboard.readText()") != snippet:
        page.wait_for_timeout(20)
    page.keyboard.press("Escape")
    return snippet


@pytest.mark.parametrize("mode", ["Chat", "Completion"])
def test_copied_code_gets_the_answer_the_page_got(live: Any, visit: Any, mode: str) -> None:
    page = visit(live.rest)
    choose(page, mode)
    setting(page, temperature=0, max_tokens=16, top_k=50, repetition_penalty=1.05, seed=3)
    page.locator("#stops").fill("zz'z\\n")
    answer = copied(finished(send(page, AWKWARD)))
    assert answer

    events = run(["sh", "-c", code_for(page, "curl")]).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices) == answer
    for language in ("Python, openai", "Python, gRPC"):
        assert run([sys.executable, "-c", code_for(page, language)]) == answer + "\n"
    assert "".join(grpcurl(code_for(page, "grpcurl"))) == answer


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def grpcurl(command: str) -> Iterator[str]:
    """What grpcurl does with such a command: JSON to a message, the call, the texts of what comes back."""
    import grpc
    from google.protobuf import json_format

    from jaxserve.v1 import inference_pb2, inference_pb2_grpc

    program, flag, data_flag, data, address, method = shlex.split(command.replace("\\\n", ""))
    assert (program, flag, data_flag) == ("grpcurl", "-plaintext", "-d")
    service, name = method.split("/")
    assert service == inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    request = json_format.Parse(data, getattr(inference_pb2, f"{name}Request")())
    with grpc.insecure_channel(address) as channel:
        for message in getattr(inference_pb2_grpc.InferenceStub(channel), name)(request):
            yield "".join(choice.text for choice in message.choices)


def test_key_is_asked_for_kept_in_the_tab_and_left_out_of_code(start_front: Callable[..., Any], visit: Any) -> None:
    live = start_front(api_key=("sesame",))
    page = visit(live.rest, refused=True)
    page.get_by_text("API key needed").wait_for()
    turn = finished(send(page, "Hello"))
    assert "The server asks for an API key" in turn.get_by_role("alert").inner_text()
    turn.get_by_role("button", name="Enter the API key").click()
    page.keyboard.type("wrong")
    turn.get_by_role("button", name="Try again").click()
    turn.get_by_text("The server did not accept this API key").wait_for()
    page.locator("#key").fill("sesame")
    page.locator("#key").blur()
    page.get_by_text(live.model).first.wait_for()
    turn.get_by_role("button", name="Try again").click()
    turn.locator(".t").first.wait_for()
    finished(turn)
    for language in ("curl", "Python, openai", "Python, gRPC", "grpcurl"):
        snippet = code_for(page, language)
        assert "JAXSERVE_API_KEY" in snippet and "sesame" not in snippet
    assert "sesame" in page.evaluate("JSON.stringify(sessionStorage)")
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    page.reload()
    page.get_by_text(live.model).first.wait_for()


def test_status_is_asked_for_only_while_the_page_is_seen(live: Any, visit: Any) -> None:
    page = visit(live.rest, clock=True)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/status") else None)
    page.get_by_text("0 of 4").wait_for()

    def polls() -> int:
        """Requests within what the page takes for five seconds."""
        before = len(asked)
        for _ in range(5):
            page.clock.run_for(1000)
            page.wait_for_timeout(100)
        return len(asked) - before

    def seen(yes: bool) -> None:
        page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            not yes,
        )

    assert polls() > 1
    seen(False)
    assert polls() == 0
    seen(True)
    assert polls() > 1


def test_page_fits_a_phone(live: Any, visit: Any) -> None:
    page = visit(live.rest, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page.get_by_text("0 of 4").wait_for()

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth === 375")

    assert fits()
    page.get_by_role("button", name="Settings").tap()
    assert page.locator("main").get_attribute("inert") is not None
    page.locator("#c-max_tokens").fill("20")
    assert fits()
    page.get_by_role("button", name="Done").tap()
    assert page.locator("main").get_attribute("inert") is None
    assert not page.locator("#c-max_tokens").is_visible()
    page.locator("#prompt").fill("The quick brown fox " + "x" * 100)
    page.get_by_role("button", name="Send").tap()
    turn = finished(page.locator(".turn"))
    assert fits()
    turn.locator(".t").nth(2).tap()
    box = page.get_by_role("tooltip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    page.get_by_role("button", name="Code for this request").tap()
    assert fits()

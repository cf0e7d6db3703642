"""Prompts equal those of transformers; hostile templates and messages end in an error, and the next render works."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxserve.errors import ChatTemplateError, ChatTemplateLimitError, InvalidRequestError
from jaxserve.text import template_process
from jaxserve.text.chat_template import ChatTemplate

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
        "+ '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}"
        "\n"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "everything": (
        "{% set ns = namespace(count=0) %}\n"
        "{% for message in messages %}\n"
        "  {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
        "  {% if ns.count >= limit | default(9) %}{% break %}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}\n"
        "  {% generation %}{{ message.content }}{% endgeneration %}\n"
        "  {{ message | tojson }} {{ message | tojson(indent=2, sort_keys=true) }} {{ message.thinking }}\n"
        "{% endfor %}\n"
        "{% macro section(name, value) %}<{{ name }}>{{ value | tojson(ensure_ascii=true) }}{% endmacro %}\n"
        "{{ section('tools', tools) }}{{ section('documents', documents) }}{{ limit }}{{ strftime_now('%Y') }}\n"
        "{{ dict(a=1) | tojson }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}\n"
        "{{ eos_token }}\n"
    ),
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi & <b>bye</b> 'quoted' \"double\""}],
    [{"role": "user", "content": "  你好 😀\n\n"}, {"role": "assistant", "content": " Hello  "}],
    [
        {"role": "system", "content": "Terse."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning": "easy"},
        {"role": "user", "content": "{{ 7*7 }} {% raw %} <|im_end|>"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä", "parameters": {"type": "object"}}}]


def expected(template, messages, **options):
    """What transformers makes of it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    prompts, _ = render_jinja_template(conversations=[messages], chat_template=template, **SPECIALS, **options)
    return prompts[0].replace("CONTINUE_FINAL_MESSAGE_TAG ", "")  # left in where a message is written twice


@pytest.fixture
def make():
    """Chat templates that are closed when the test ends."""
    made = []

    def make(template, **options):
        made.append(ChatTemplate(template, SPECIALS, **options))
        return made[-1]

    yield make
    for chat_template in made:
        chat_template.close()


def child_of(chat_template: ChatTemplate) -> subprocess.Popen:
    return chat_template._process._child


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_those_of_transformers(make, name):
    chat_template = make(TEMPLATES[name])
    for messages in CONVERSATIONS:
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "tools": TOOLS, "documents": [{"title": "t", "text": "x"}], "limit": 2},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            assert chat_template.render(messages, **options) == expected(TEMPLATES[name], messages, **options)


def test_default_model_prompts_equal_those_of_transformers(make, default_model):
    chat_template = make(default_model.chat_template)
    for messages in CONVERSATIONS:
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            assert chat_template.render(messages, **options) == expected(
                default_model.chat_template, messages, **options
            )


def test_tool_calls_without_content_equal_those_of_transformers(make):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIALS)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
    ]
    template = "{% for m in messages %}{{ m | tojson }}{{ m.content is defined }}{% endfor %}{{ tools | tojson }}"
    ours = make(template).render(messages, tools=TOOLS)
    assert ours == theirs.apply_chat_template(
        messages, chat_template=template, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )


def test_continued_message_is_left_open(make):
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert make(TEMPLATES["chatml"]).render(messages, **options).endswith("assistant\none two ")
    assert make(TEMPLATES["llama3"]).render(messages, **options).endswith("\n\none two")  # that template trims
    assert messages[-1]["content"] == "one two "


def test_continued_message_must_survive_the_template(make):
    chat_template = make("{{ messages[0].content }}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ChatTemplateError, match="final message"):
        chat_template.render(messages, add_generation_prompt=False, continue_final_message=True)


def test_continuing_and_prompting_contradict_each_other(make):
    with pytest.raises(InvalidRequestError, match="add_generation_prompt") as caught:
        make(TEMPLATES["chatml"]).render(CONVERSATIONS[1], continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_named_templates_are_chosen_as_by_transformers(make):
    chat_template = make({"default": "plain", "tool_use": "with tools", "rag": "no"})
    assert chat_template.render(CONVERSATIONS[0]) == "plain"
    assert chat_template.render(CONVERSATIONS[0], tools=TOOLS) == "with tools"
    assert make({"default": "plain"}).render(CONVERSATIONS[0], tools=TOOLS) == "plain"
    with pytest.raises(ChatTemplateError, match="rag, tool_use") as caught:
        make({"tool_use": "t", "rag": "r"}).render(CONVERSATIONS[0])
    assert caught.value.field == "chat_template"


def test_kwargs_come_before_special_tokens(make):
    assert make("{{ bos_token }}{{ x }}").render(CONVERSATIONS[0], bos_token="B", x=[1]) == "B[1]"


def test_text_parts_become_one_string(make):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert make("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (None, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": 3, "content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content"),
        ([{"role": "user", "content": "a", "extra": object()}], "messages"),
    ],
)
def test_malformed_messages_are_named(make, messages, field):
    with pytest.raises(InvalidRequestError) as caught:
        make("x").render(messages)
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize(
    ("template", "field", "message"),
    [
        (None, "chat_template", "no chat template; pass one"),
        ("{% if %}", "chat_template", "line 1"),
        ("a\n{{ b | nofilter }}", "chat_template", "line 2.*nofilter"),
        ("{{ raise_exception('only users') }}", "messages", "refused the messages: only users"),
        ("{{ nothing.at.all }}", "messages", "'nothing' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "messages", "recursion"),
    ],
)
def test_failing_template_says_why(make, template, field, message):
    with pytest.raises(ChatTemplateError, match=f"(?i){message}") as caught:
        make(template).render(CONVERSATIONS[0])
    assert caught.value.field == field


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['sys'].exit() }}",
        "{{ (strftime_now | attr('__globals__'))['sys'].exit() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.from_string('x').__class__ }}",
        "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(messages).x }}",
        "{{ [''] | map(attribute='__class__') | first | attr('mro') }}{{ x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.environ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_template_cannot_leave_the_sandbox(make, template):
    with pytest.raises(ChatTemplateError, match=r"(?i)unsafe|undefined|loader|not safely"):
        make(template).render(CONVERSATIONS[0])


def test_runaway_templates_end_and_the_next_render_works(make):
    chat_template = make(
        {
            "default": "{{ 'fine' }}",
            "tool_use": "{% if which == 0 %}{{ messages[0].content * 10**9 }}"
            "{% elif which == 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
            "{% elif which == 2 %}{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}"
            "{% elif which == 3 %}{{ 'x' | center(10**10) }}"
            "{% else %}{{ range(10**9) | list }}{% endif %}",
        },
        timeout_s=1.5,
    )
    for which, message in enumerate(["memory", r"longer than 1\.5 s", "more than 4194314", "memory", "Range too big"]):
        with pytest.raises(ChatTemplateError, match=message) as caught:
            chat_template.render([{"role": "user", "content": "aaaaaaaaaa"}], tools=TOOLS, which=which)
        assert caught.value.field == "messages"
        assert chat_template.render(CONVERSATIONS[0]) == "fine"


def test_constant_that_would_fill_memory_fails_within_the_cap(make):
    """Jinja computes constants when it compiles."""
    with pytest.raises(ChatTemplateError, match=r"memory|longer than|characters"):
        make("{{ 'a'*10**9 }}").render(CONVERSATIONS[0])


def test_output_up_to_the_cap_is_allowed_beside_the_messages(make):
    chat_template = make("{{ messages[0].content * 10 }}", max_output_chars=27)
    assert chat_template.render([{"role": "user", "content": "😀é\ud800"}]) == "😀é\ud800" * 10
    with pytest.raises(ChatTemplateLimitError, match="more than 31 characters"):
        chat_template.render([{"role": "user", "content": "abcd"}])


def test_render_works_after_the_worker_was_killed(make):
    chat_template = make(TEMPLATES["chatml"])
    first = chat_template.render(CONVERSATIONS[0])
    child = child_of(chat_template)
    os.kill(child.pid, signal.SIGKILL)
    assert chat_template.render(CONVERSATIONS[0]) == first
    assert child_of(chat_template).pid != child.pid
    child = child_of(chat_template)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert chat_template.render(CONVERSATIONS[0]) == first


def test_one_worker_serves_every_render(make):
    chat_template = make(TEMPLATES["chatml"])
    assert child_of(chat_template) is None  # started by the first render only
    pids = set()
    for messages in CONVERSATIONS:
        chat_template.render(messages)
        pids.add(child_of(chat_template).pid)
    assert len(pids) == 1


def test_threads_get_their_own_answers(make):
    chat_template = make("{{ messages[0].content }}")
    wrong = []

    def render(name):
        for i in range(30):
            content = f"{name}-{i}"
            if chat_template.render([{"role": "user", "content": content}]) != content:
                wrong.append(content)

    threads = [threading.Thread(target=render, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_worker_ends_when_the_template_is_closed_or_collected():
    chat_template = ChatTemplate("x", {})
    chat_template.render(CONVERSATIONS[0])
    child = child_of(chat_template)
    chat_template.close()
    assert child.returncode is not None
    other = ChatTemplate("x", {})
    other.render(CONVERSATIONS[0])
    child = child_of(other)
    del other
    assert child.returncode is not None


def start_worker() -> subprocess.Popen:
    command = [sys.executable, "-I", "-B", str(template_process.WORKER), str(1 << 30)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    read_answer(child)
    return child


def read_answer(child: subprocess.Popen) -> dict:
    size = int.from_bytes(child.stdout.read(8), "big")
    return json.loads(child.stdout.read(size))


def end(child: subprocess.Popen) -> int:
    code = child.wait(timeout=60)
    child.stdout.close()
    return code


def test_idle_worker_ends_when_its_parent_is_gone():
    child = start_worker()
    child.stdin.close()  # what the kernel does when the parent dies
    assert end(child) == 0


def test_busy_worker_ends_when_its_parent_is_gone():
    child = start_worker()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    request = {"template": endless, "context": {}, "max_chars": 10, "timeout_s": 0.1}
    body = json.dumps(request).encode()
    child.stdin.write(len(body).to_bytes(8, "big") + body)
    child.stdin.close()
    assert end(child) == -signal.SIGALRM


def test_code_that_left_the_sandbox_finds_no_files_programs_or_sockets():
    attempts = [
        "open('/etc/passwd')",
        f"open({str(Path(json.__file__))!r}, 'a')",
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.system('true')",
        "os.fork()",
        "subprocess.run(['true'])",
        "socket.socket().connect(('127.0.0.1', 9))",
    ]
    program = (
        "import os, runpy, socket, subprocess, sys\n"
        f"sys.argv = ['worker', str(1 << 30)]\nworker = runpy.run_path({str(template_process.WORKER)!r})\n"
        "worker['confine'](1 << 30)\n"
        f"for attempt in {attempts!r}:\n"
        "    try:\n        eval(attempt)\n    except PermissionError as error:\n        print(error)\n"
        "import this_is_absent\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.stdout.count("chat templates may not") == len(attempts), done.stdout + done.stderr
    assert "ModuleNotFoundError" in done.stderr  # importing still works as far as it should

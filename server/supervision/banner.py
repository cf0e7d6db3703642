"""The lines to try: settings and ports go in, text for a terminal comes out, each line ready to be pasted."""

import ipaddress
import json
import logging
import shlex
import sys

from server.settings import ServerSettings
from server.supervision.ports import Ports

logger = logging.getLogger(__name__)

KEY = "$JAXSERVE_API_KEY"  # never the key itself: this lands in logs
QUESTION, BEGINNING = "Why is the sky blue?", "The capital of France is"
BRIEF = {"max_tokens": 64, "temperature": 0}  # without it a small model may ramble to the end of its context


def announce(settings: ServerSettings, ports: Ports, model: str) -> None:
    """Tells stderr that requests are answered: people get the lines to try, JSON logs one line."""
    if settings.log_format == "json":
        fields = {"model": model, "host": settings.host, "admin_host": settings.admin_host, **ports.to_json()}
        logger.info("%s is ready", model, extra={"fields": fields})
    else:
        print(banner(settings, ports, model), file=sys.stderr, flush=True)


def banner(settings: ServerSettings, ports: Ports, model: str) -> str:
    """model: the name that responses carry."""
    scheme = "https" if settings.ssl_certfile else "http"
    rest = f"{scheme}://{_address(settings.host, ports.rest)}"
    admin = f"http://{_address(settings.admin_host, ports.admin)}"
    sections = [
        ("curl", [_curl(settings, rest, model)]),
        ("grpcurl", [_grpcurl(settings, _address(settings.host, ports.grpc))]),
        ("Python, any OpenAI client", _openai(settings, rest, model)),
        ("Python, gRPC", _client(settings, _address(settings.host, ports.grpc))),
    ]
    lines = [f"{model} is ready: REST on {rest}, gRPC on {_address(settings.host, ports.grpc)}"]
    for title, body in sections:
        lines += ["", f"# {title}", *body]
    if settings.ssl_certfile:
        lines += ["", "# A certificate of your own: add --cacert FILE to curl, -cacert FILE to grpcurl"]
    lines += [""]
    if settings.playground:
        lines.append(f"browser  {rest}/")
    lines += [f"health   {rest}/health/ready", f"metrics  {admin}/metrics", "stop     Ctrl-C"]
    return "\n".join(lines)


def _curl(settings: ServerSettings, rest: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], **BRIEF, "stream": True}
    options = ["curl", "-N", f"{rest}/v1/chat/completions", "-H", "'content-type: application/json'"]
    if settings.api_key:
        options += ["-H", f'"authorization: Bearer {KEY}"']  # double quotes: the shell fills it in
    if settings.ssl_ca_certs:
        options += ["--cert", "client.pem", "--key", "client-key.pem"]
    return " ".join([*options, "-d", shlex.quote(json.dumps(body, ensure_ascii=False))])


def _grpcurl(settings: ServerSettings, address: str) -> str:
    options = ["grpcurl"]
    if not settings.ssl_certfile:
        options.append("-plaintext")
    if settings.ssl_ca_certs:
        options += ["-cert", "client.pem", "-key", "client-key.pem"]
    if settings.api_key:
        options += ["-H", f'"authorization: Bearer {KEY}"']
    body = shlex.quote(json.dumps({"text": BEGINNING, "sampling": BRIEF}))
    return " ".join([*options, "-d", body, address, "jaxserve.v1.Inference/GenerateStream"])


def _openai(settings: ServerSettings, rest: str, model: str) -> list[str]:
    key = 'os.environ["JAXSERVE_API_KEY"]' if settings.api_key else '"none"'
    return [
        *(["import os"] if settings.api_key else []),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{rest}/v1", api_key={key})',
        f"messages = {json.dumps([{'role': 'user', 'content': QUESTION}])}",
        f"answer = client.chat.completions.create(model={json.dumps(model)}, messages=messages, {_words()})",
        "print(answer.choices[0].message.content)",
    ]


def _client(settings: ServerSettings, address: str) -> list[str]:
    options = ', api_key=os.environ["JAXSERVE_API_KEY"]' if settings.api_key else ""
    options += ", tls=True" if settings.ssl_certfile else ""
    return [
        *(["import os"] if settings.api_key else []),
        "from jaxserve.client import Client",
        f'with Client("{address}"{options}) as client:',
        f"    for chunk in client.stream({json.dumps(BEGINNING)}, {_words()}):",
        '        print(chunk.text, end="", flush=True)',
    ]


def _words() -> str:
    return ", ".join(f"{name}={value}" for name, value in BRIEF.items())


def _address(host: str, port: int) -> str:
    """host:port as a client on this machine can dial it."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return f"{host}:{port}"
    if ip.is_unspecified:
        ip = ipaddress.ip_address("::1" if ip.version == 6 else "127.0.0.1")
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"

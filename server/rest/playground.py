"""The page at `/`. In: playground.html beside this file. Out: its bytes, with headers that let it do only its job.

The policy names the page's own script and style by their hashes, lets it talk to this server alone, and forbids turning
strings into HTML or script, so that text of a model stays text whatever it says.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

PAGE = Path(__file__).with_name("playground.html")

router = APIRouter(include_in_schema=False)


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers it must be sent with. Raises ValueError if it does not hold one script and one style."""
    body = PAGE.read_bytes()
    script, style = _hash_of(body, b"script"), _hash_of(body, b"style")
    policy = (
        "default-src 'none'",
        f"script-src '{script}'",
        f"style-src '{style}'",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


@router.api_route("/", methods=["GET", "HEAD"])
async def playground(request: Request) -> Response:
    """The page, or 304 for a browser that has it. It holds no secret, so it needs no key; what it calls does."""
    body, headers = page()
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers={k: v for k, v in headers.items() if k != "Content-Type"})
    return Response(body, headers=headers)


def _hash_of(body: bytes, tag: bytes) -> str:
    """The CSP source that stands for the one inline element of this kind."""
    found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", body, re.DOTALL)
    if len(found) != 1 or len(re.findall(rb"<" + tag + rb"\b", body)) != 1 or b"\r" in body:
        raise ValueError(f"{PAGE.name} must hold exactly one inline <{tag.decode()}>, and no carriage returns")
    return "sha256-" + base64.b64encode(hashlib.sha256(found[0]).digest()).decode()

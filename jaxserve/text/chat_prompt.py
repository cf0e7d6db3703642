"""A conversation in, prompt text and token ids out, such that nobody's message can spell a special token.

The template's own special tokens are special; the same characters in a message, a tool or a variable are plain text.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_special_tokens: bool = False,
    check: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> tuple[str, list[int]]:
    """Returns (prompt text, token ids). options: those of `ChatTemplate.render`, which raises for bad messages.

    check               called with the rendered text before it is tokenized; may raise
    add_special_tokens  add what the model puts around every input; most templates write it themselves
    """
    mark = "PLAIN" + secrets.token_hex(16)  # letters and digits pass through any template unchanged
    plain: list[str] = []
    pattern = tokenizer.special_pattern

    def hide(found: re.Match[str]) -> str:
        plain.append(found[0])
        return f"{mark}{len(plain) - 1}END"

    if pattern is not None:
        substitute = lambda text: pattern.sub(hide, text)  # noqa: E731
        messages = _map_strings(messages, substitute)
        options = {name: _map_strings(value, substitute) for name, value in options.items()}
    text = template.render(messages, **options)
    check(text)
    if not plain:
        return text, tokenizer.encode(text, add_special_tokens=add_special_tokens)
    pieces = re.split(f"{mark}([0-9]+)END", text)  # template text, number, template text, number, ...
    pieces[1::2] = [plain[int(number)] for number in pieces[1::2]]
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        special = i % 2 == 0
        ids += tokenizer.encode(piece, add_special_tokens=add_special_tokens and i == 0, parse_special=special)
    return "".join(pieces), ids


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys too; shared structure is copied, so depth is bounded by JSON's."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(entry, change) for entry in value]
    return value

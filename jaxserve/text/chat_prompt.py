"""A conversation in, prompt text and token ids out, such that nobody's message can spell a special token.

The template's own special tokens are special; the same characters in a message, a tool or a variable are plain text.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

MARK_DIGITS = 32  # of what stands for special text while a template is rendered; nobody guesses so many
NUMBER_DIGITS = 8  # and says which one it stands for


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

    check               called with the prompt text before it is tokenized; may raise
    add_special_tokens  add what the model puts around every input; most templates write it themselves
    """
    # Digits pass through any template unchanged, one that writes names in upper case too.
    mark = f"{secrets.randbelow(10**MARK_DIGITS):0{MARK_DIGITS}}"
    plain: list[str] = []
    pattern = tokenizer.special_pattern

    def hide(found: re.Match[str]) -> str:
        plain.append(found[0])
        return f"{mark}{len(plain) - 1:0{NUMBER_DIGITS}}"

    if pattern is not None:
        substitute = lambda text: pattern.sub(hide, text)  # noqa: E731
        messages = _map_strings(messages, substitute)
        options = {name: _map_strings(value, substitute) for name, value in options.items()}
    text = template.render(messages, **options)
    if not plain:
        check(text)
        return text, tokenizer.encode(text, add_special_tokens=add_special_tokens)
    pieces = re.split(f"{mark}([0-9]{{{NUMBER_DIGITS}}})", text)  # template text, number, template text, number, ...
    pieces[1::2] = [plain[int(number)] for number in pieces[1::2]]
    text = "".join(pieces)
    check(text)
    encoded: list[list[int]] = [[]] * len(pieces)
    encoded[0::2] = tokenizer.encode_batch(pieces[0::2], add_special_tokens=False)
    encoded[1::2] = tokenizer.encode_batch(pieces[1::2], add_special_tokens=False, parse_special=False)
    if add_special_tokens:
        encoded[0] = tokenizer.encode(pieces[0], add_special_tokens=True)
    return text, [token for ids in encoded for token in ids]


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys too; shared structure is copied, so depth is bounded by JSON's."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(entry, change) for entry in value]
    return value

"""Log probabilities as the engine gives them -> the two formats of OpenAI's API, and vLLM's for prompts.

The engine's entry for one position is {token id: Logprob}: the chosen token first, then the k likeliest in order, the
chosen one left out where it is among them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.request import Logprob, SamplingParams
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.tokenizer import Tokenizer

Position = Mapping[int, Logprob]

LOWEST = -9999.0  # stands for -inf, which JSON does not have


class TokenNames:
    """What tokens are called in logprobs. as_ids: "token_id:17" instead of the text."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token: int, logprob: Logprob | None = None) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        if logprob is not None and logprob.decoded_token is not None:
            return logprob.decoded_token
        return self.tokenizer.token_text(token)

    def bytes(self, token: int) -> list[int] | None:
        found = self.tokenizer.token_bytes(token)
        return None if found is None else list(found)


class TextOffsets:
    """Where the tokens of one sample begin in its choice's text, in characters.

    start: length of the text before the sample's own, which is that of an echoed prompt.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int], start: int):
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, params, prompt_token_ids)
        self._next = start

    def add(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets of the next tokens. A token that completes no character begins where the character will."""
        offsets = []
        for token in token_ids:
            new, own = self._text.append([token]), self._tokenizer.token_text(token)
            # Broken characters before the token can become text with it.
            offsets.append(self._next + (len(new) - len(own) if new.endswith(own) else 0))
            self._next += len(new)
        return offsets


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in `text`; special tokens that `text` does not spell have no width."""
    pieces = IncrementalDetokenizer(tokenizer, SamplingParams(skip_special_tokens=False), [])
    offsets, position = [], 0
    for token in token_ids:
        offsets.append(min(position, len(text)))
        piece = pieces.append([token])
        if token not in tokenizer.special_ids or text.startswith(piece, position):
            position += len(piece)
    return offsets


def completion_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position | None], offsets: list[int], names: TokenNames
) -> dict[str, Any]:
    """Of /v1/completions. A position without log probabilities (a prompt's first) is None."""
    token_names, chosen, tops = [], [], []
    for token, position in zip(token_ids, positions, strict=True):
        token_names.append(names.name(token, position[token] if position else None))
        chosen.append(_finite(position[token].logprob) if position else None)
        tops.append(_top_by_name(position, names) if position else None)
    return {"tokens": token_names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(positions: Sequence[Position], top: int, names: TokenNames) -> dict[str, Any]:
    """Of /v1/chat/completions. top: how many of the likeliest tokens were asked for."""
    content = []
    for position in positions:
        token, logprob = next(iter(position.items()))
        likeliest = [_chat_token(other, entry, names) for other, entry in _likeliest(position, top)]
        content.append(_chat_token(token, logprob, names) | {"top_logprobs": likeliest})
    return {"content": content}


def prompt_logprobs(positions: Sequence[Position | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: token id -> log probability, rank and text; None for the first token."""
    return [None if position is None else _prompt_position(position) for position in positions]


def _prompt_position(position: Position) -> dict[str, Any]:
    return {
        str(token): {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token, entry in position.items()
    }


def _likeliest(position: Position, top: int) -> list[tuple[int, Logprob]]:
    entries = list(position.items())
    if len(entries) > top:  # the chosen token is not among the likeliest
        return entries[1:]
    return sorted(entries, key=lambda entry: entry[1].rank or 0)


def _chat_token(token: int, logprob: Logprob, names: TokenNames) -> dict[str, Any]:
    return {"token": names.name(token, logprob), "logprob": _finite(logprob.logprob), "bytes": names.bytes(token)}


def _top_by_name(position: Position, names: TokenNames) -> dict[str, float]:
    """Several tokens can have one text, as parts of characters do: the likeliest of them stands."""
    tops: dict[str, float] = {}
    for token, entry in sorted(position.items(), key=lambda item: item[1].rank or 0):
        tops.setdefault(names.name(token, entry), _finite(entry.logprob))
    return tops


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

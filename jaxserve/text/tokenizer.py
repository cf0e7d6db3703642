"""A model's tokenizer: text in, token ids out, and back. Loaded from a Hugging Face directory or from GGUF metadata."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import InvalidRequestError, TokenOutOfRangeError
from jaxserve.text.gguf_tokenizer import build_tokenizer
from jaxserve.text.hf_files import read_directory

REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (yet) a character
# How byte-level vocabularies write bytes: those that Latin-1 prints as they are, the others from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)).difference(_PRINTED)))
}
GGUF_TEMPLATE = "tokenizer.chat_template"  # further templates: "tokenizer.chat_template.<name>"


class Tokenizer:
    """Wraps one `tokenizers.Tokenizer`, which it owns and never changes after construction; safe to share by threads.

    vocab_size      ids are in [0, vocab_size); the model's embedding may be padded beyond it
    special_tokens  {"bos_token": text, ...}, as chat templates see them
    special_ids     ids that `skip_special_tokens` leaves out
    special_pattern what matches their texts; None = there are none
    chat_template   Jinja text, several by name, or None
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        backend.no_truncation()  # tokenizer.json may carry the settings of someone's training run
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max([backend.get_vocab_size(with_added_tokens=True), *(token + 1 for token in added)])
        self.special_ids = frozenset(token for token, info in added.items() if info.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self._token_texts: dict[int, str] = {}  # as far as asked for
        self._special_texts = {added[token].content for token in self.special_ids}
        spelled = [text for text in self._special_texts if text]
        self.special_pattern = re.compile(_any_of(spelled)) if spelled else None
        # The unknown token also comes from ordinary text, so it does not tell that special text got through.
        self._forbidden_in_plain = self.special_ids - {self._special_id("unk_token")}

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens  add what the model puts around every input (such as a beginning-of-sequence token)
        parse_special       False = text that spells a special token is ordinary text, as untrusted input must be

        Raises `InvalidRequestError` (field "prompt") where `text` is no string of Unicode characters.
        """
        return self.encode_batch([text], add_special_tokens, parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """`encode` for several texts, in parallel."""
        for text in texts:
            _check_text(text)
        backend = self._backend if parse_special else self._plain_backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        batch = [encoding.ids for encoding in encodings]
        if not parse_special:
            for i, text in enumerate(texts):
                if any(special in text for special in self._special_texts):
                    batch[i] = self._without_special(text, batch[i], add_special_tokens)
        return batch

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD, ids beyond the vocabulary become nothing.

        Some decoders put spaces between tokens; `spaces_between_special_tokens=False` takes away those between two
        adjacent special tokens. Raises `TokenOutOfRangeError` for an id that is no unsigned 32-bit number.
        """
        try:
            if skip_special_tokens or spaces_between_special_tokens:
                return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
            parts: list[list[int]] = [[]]
            for previous, token in zip([None, *ids], ids, strict=False):
                if token in self.special_ids and previous in self.special_ids:
                    parts.append([])
                parts[-1].append(token)
            return "".join(self._backend.decode(part, skip_special_tokens=False) for part in parts)
        except OverflowError:
            wrong = next(token for token in ids if not 0 <= token < 2**32)
            raise TokenOutOfRangeError(
                f"token id {wrong} is outside [0, {self.vocab_size})", "token_ids", wrong
            ) from None

    def token_text(self, token: int) -> str:
        """Text one token adds to a text, leading space included; U+FFFD for part of a character, "" if unknown."""
        text = self._token_texts.get(token)
        if text is None:
            anchor, anchor_text = self._anchor
            text = self.decode([*anchor, token], skip_special_tokens=False)[len(anchor_text) :]
            self._token_texts[token] = text
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """Bytes one token adds to a text, also of part of a character; None where the vocabulary does not tell them."""
        text = self.token_text(token)
        if REPLACEMENT not in text:
            return text.encode()
        piece = self._backend.id_to_token(token) or ""
        if found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(found[1])
        if not all(char in BYTE_LEVEL for char in piece):
            return None
        added = bytes(BYTE_LEVEL[char] for char in piece)
        return added if added.decode(errors="replace") == text else None

    @functools.cached_property
    def max_token_chars(self) -> int | None:
        """No token stands for more characters of text than this; None where one may, or text may vanish altogether."""
        backend = self._backend
        strips = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
        if backend.normalizer is not None or strips or not _keeps_all(backend):
            return None
        return max(map(len, backend.get_vocab(with_added_tokens=True)))

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token to stand before another one: decoders strip the leading space of the first."""
        ids = self.encode("a", add_special_tokens=False)[-1:]
        return ids, self.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy, since `encode_special_tokens` is a setting of the tokenizer and other threads may be encoding."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _without_special(self, text: str, ids: list[int], add_special_tokens: bool) -> list[int]:
        """`ids` of `text`, encoded anew in pieces if the tokenizer's own model made a special token of plain text.

        Models that look up whole pieces (Unigram) can, whatever `encode_special_tokens` says.
        """
        bare = self._plain_backend.encode(text, add_special_tokens=False).ids if add_special_tokens else ids
        if self._forbidden_in_plain.isdisjoint(bare):
            return ids
        pieces = [text]
        for special in sorted(self._special_texts, key=len, reverse=True):
            pieces = [part for piece in pieces for part in _cut_inside(piece, special)]
        bare = [token for piece in pieces for token in self._plain_backend.encode(piece, add_special_tokens=False).ids]
        if not self._forbidden_in_plain.isdisjoint(bare):
            raise InvalidRequestError("prompt spells a special token that cannot be written as plain text", "prompt")
        if not add_special_tokens:
            return bare
        around = self._plain_backend.encode("a", add_special_tokens=False).ids
        framed = self._plain_backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(around)] == around)
        return framed[:start] + bare + framed[start + len(around) :]

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def load_tokenizer(source: Path | Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer of a model directory (a path) or of a GGUF file (its metadata as a mapping).

    Raises `ModelNotFoundError` where a directory holds no tokenizer, `CorruptFileError` where one cannot be read,
    `UnsupportedModelError` where it is of a kind that cannot be used.
    """
    if isinstance(source, Mapping):
        return _from_gguf(source)
    return Tokenizer(*read_directory(Path(source)))


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    built = build_tokenizer(metadata)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special_tokens = {name: getattr(built, name) for name in names if getattr(built, name) is not None}
    named = {
        key.removeprefix(GGUF_TEMPLATE + "."): template
        for key, template in metadata.items()
        if key.startswith(GGUF_TEMPLATE + ".") and isinstance(template, str)
    }
    chat_template: str | dict[str, str] | None = built.chat_template
    if named:
        default = {} if built.chat_template is None else {"default": built.chat_template}
        chat_template = named | default
    return Tokenizer(built.tokenizer, special_tokens, chat_template)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError(f"prompt must be text, not {type(text).__name__}", "prompt", text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"prompt holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}", "prompt"
        ) from None


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression for the longest of `texts` that stands at a place.

    It looks at common beginnings once: with hundreds of texts that begin alike, a plain alternation takes seconds to
    search a few megabytes, and lets no other thread run meanwhile.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(text)
    branches = []
    for group in groups.values():
        beginning = commonprefix(group)
        rests = [text[len(beginning) :] for text in group]
        longer = [rest for rest in rests if rest]
        optional = "?" if "" in rests else ""
        branches.append(re.escape(beginning) + (f"(?:{_any_of(longer)}){optional}" if longer else ""))
    return "|".join(branches)


def _keeps_all(backend: tokenizers.Tokenizer) -> bool:
    """Whether every character of a text is known to be in some token, and runs of unknown ones are not one token."""
    model, splitter = backend.model, backend.pre_tokenizer
    if not isinstance(model, tokenizers.models.BPE) or splitter is None:
        return False
    state = json.loads(splitter.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    kinds = {part["type"] for part in parts}
    removes = any(part.get("behavior") == "Removed" for part in parts)
    by_bytes = "ByteLevel" in kinds or model.byte_fallback
    return by_bytes and not removes and kinds <= {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}


def _cut_inside(text: str, special: str) -> list[str]:
    """`text` in pieces, cut after the first character of every `special`, so that no piece holds it whole."""
    first, *rest = text.split(special)
    pieces = [first]
    for part in rest:
        pieces[-1] += special[0]
        pieces.append(special[1:] + part)
    return [piece for piece in pieces if piece]

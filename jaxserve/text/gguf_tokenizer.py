"""The tokenizer that a GGUF file describes: metadata dict in, a ready `tokenizers.Tokenizer` out.

Two kinds (`tokenizer.ggml.model`): "gpt2", byte-level BPE with the merges in the file, and "llama", SentencePiece BPE
whose merges follow from the scores. Where GGUF leaves something out (how digits split, whether Unicode is normalised),
the pre-tokenizer's name stands for a known original tokenizer, and that one is rebuilt, so that token ids equal those
of Hugging Face's tokenizer.json. A name that is not in `PRE_TOKENIZERS` is refused: a near miss would degrade the
model without a word. As there, a byte that the vocabulary lacks is dropped by the byte-level kind.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import CorruptFileError, UnsupportedModelError

MAX_PIECE_CHARS = 256  # SentencePiece writes 16 unless told otherwise; finding merges is quadratic in it

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # how SentencePiece spells a space


class GGUFTokenizer(NamedTuple):
    """A tokenizer and what a front end must know of it. Encoding with `add_special_tokens` adds what `add_*` say."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


class PreTokenizer(NamedTuple):
    """How text is cut before merging: each pattern in turn isolates its matches in the pieces so far.

    whole_words  a piece that is itself a token stays whole, whatever the merges say
    add_bos      what a file means that does not say
    nfc          the original tokenizer normalises to NFC
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


# The patterns are those of the original tokenizers: GPT-2, Llama 3, Qwen 2, Mistral's Tekken.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer((_MODERN.format(digits=r"\p{N}{1,3}"),), whole_words=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # what GGUF itself defines for a file that names no original
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer((_MODERN.format(digits=r"\p{N}"),), nfc=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """The tokenizer described by the `tokenizer.*` keys of a GGUF file's metadata.

    Control and unknown tokens are matched in text and skipped by `skip_special_tokens`; user-defined tokens are
    matched and kept. Raises `UnsupportedModelError` for a kind or pre-tokenizer that is not known, `CorruptFileError`
    for missing or contradictory metadata.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"tokenizer.ggml.model={kind!r} is not supported (supported: gpt2, llama)")
    vocab = _Vocab(metadata)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, vocab)
        unk = vocab.token_id("unknown")
    else:
        unk = vocab.token_id("unknown", 0)
        tokenizer, add_bos = _sentencepiece(metadata, vocab, unk), True
    bos, eos = (
        vocab.token_id(name, default if kind == "llama" else None) for name, default in (("bos", 1), ("eos", 2))
    )
    ends = {bos, eos, vocab.token_id("eot"), vocab.token_id("eom")}
    special, kept = [], []
    for number, (token, token_type) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if token_type in (_UNKNOWN, _CONTROL) or number in ends:
            special.append(AddedToken(token, normalized=False, special=True))
        elif token_type == _USER_DEFINED:
            kept.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)  # in one call each: every call rebuilds the matcher
    tokenizer.add_tokens(kept)
    assert tokenizer.get_vocab_size() == len(vocab.tokens), "added tokens are tokens of the vocabulary"

    add_bos = _flag(metadata, "tokenizer.ggml.add_bos_token", add_bos)
    add_eos = _flag(metadata, "tokenizer.ggml.add_eos_token", False)
    for name, wanted, token_id in (("bos", add_bos, bos), ("eos", add_eos, eos)):
        if wanted and token_id is None:
            raise CorruptFileError(f"tokenizer.ggml.{name}_token_id is missing, though a {name} token must be added")
    _add_ends(tokenizer, vocab, bos if add_bos else None, eos if add_eos else None)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CorruptFileError("tokenizer.chat_template is not a string")
    return GGUFTokenizer(
        tokenizer=tokenizer,
        bos_token=vocab.text(bos),
        eos_token=vocab.text(eos),
        pad_token=vocab.text(vocab.token_id("padding")),
        unk_token=vocab.text(unk),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
    )


class _Vocab:
    """tokens list[str], types i64[tokens] and the ids in `tokens`, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        stored = _strings(metadata, "tokenizer.ggml.tokens")
        if not stored:
            raise CorruptFileError("tokenizer.ggml.tokens is empty")
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(stored)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise CorruptFileError(f"tokenizer.ggml.tokens holds {twice[:80]!r} more than once")
        self.types: list[int] = self.numbers("tokenizer.ggml.token_type", "iu", _NORMAL).tolist()

    def numbers(self, key: str, kinds: str, default: int | None = None) -> np.ndarray:
        """[tokens]: one number a token. `kinds` are NumPy dtype kinds; default None = must be there."""
        if key not in self.metadata and default is not None:
            return np.full(len(self.tokens), default)
        values = np.asarray(self.metadata.get(key))
        if values.shape != (len(self.tokens),) or values.dtype.kind not in kinds:
            raise CorruptFileError(
                f"{key} must hold one number for each of {len(self.tokens)} tokens, not {values.dtype}{values.shape}"
            )
        return values

    def token_id(self, name: str, default: int | None = None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.metadata:
            return default if default is not None and default < len(self.tokens) else None
        value = self.metadata[key]
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise CorruptFileError(f"{key}={str(value)[:80]!r} is not a token id in 0..{len(self.tokens) - 1}")
        return value

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]


def _byte_level(metadata: Mapping[str, Any], vocab: _Vocab) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: text as bytes, bytes spelled as 256 printable characters, merges from the file."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre={str(name)[:80]!r} is not supported (supported: {', '.join(PRE_TOKENIZERS)})"
        )
    tokenizer = _bpe(vocab, _file_merges(metadata), ignore_merges=pre.whole_words)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocab: _Vocab, unk: int | None) -> Tokenizer:
    """Llama's kind: spaces spelled as U+2581, unknown characters as their bytes, the best-scored merge first.

    As in Llama's tokenizer.json, the leading space is added to every stretch of text, also after a special token.
    """
    if _flag(metadata, "tokenizer.ggml.remove_extra_whitespaces", False):
        raise UnsupportedModelError("tokenizer.ggml.remove_extra_whitespaces=True is not supported")
    merges = _file_merges(metadata) if "tokenizer.ggml.merges" in metadata else _merges_from_scores(vocab)
    tokenizer = _bpe(vocab, merges, unk_token=vocab.text(unk), fuse_unk=True, byte_fallback=True)
    leading_space = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if leading_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading_space else steps)
    return tokenizer


def _bpe(vocab: _Vocab, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab.ids, merges=merges, **options))
    except Exception as error:  # the library raises bare Exception, for merges that make or join unknown tokens
        raise CorruptFileError(
            f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {str(error)[:160]!r}"
        ) from None


def _file_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_strings(metadata, "tokenizer.ggml.merges")):
        gap = line.find(" ", 1)  # from 1: the left part is never empty, but may begin with a space
        if gap < 0 or gap + 1 == len(line):
            raise CorruptFileError(f"merge {number} of tokenizer.ggml.merges is not two tokens: {line[:80]!r}")
        merges.append((line[:gap], line[gap + 1 :]))
    return merges


def _merges_from_scores(vocab: _Vocab) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: what SentencePiece searches for as it encodes.

    Only normal pieces: the spelling of a control or byte token is not reachable by merging text.
    """
    scores = vocab.numbers("tokenizer.ggml.scores", "f").tolist()
    normal = {token for token, token_type in zip(vocab.tokens, vocab.types, strict=True) if token_type == _NORMAL}
    found = []
    for number, (piece, score) in enumerate(zip(vocab.tokens, scores, strict=True)):
        if piece not in normal:
            continue
        if len(piece) > MAX_PIECE_CHARS:
            raise CorruptFileError(f"token {number} has {len(piece)} characters, more than {MAX_PIECE_CHARS}")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                # equal scores: longer left part first, as Hugging Face's conversion orders them
                found.append((-score, -len(left), -len(right), number, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_ends(tokenizer: Tokenizer, vocab: _Vocab, bos: int | None, eos: int | None) -> None:
    """Encoding with `add_special_tokens` puts these tokens before and after each text."""
    before = [vocab.tokens[bos]] if bos is not None else []
    after = [vocab.tokens[eos]] if eos is not None else []
    if not before and not after:
        return
    if any(token.startswith("$") or ":" in token for token in before + after):
        # the template would take it for a placeholder, or for a token and its type, and say nothing
        raise UnsupportedModelError(f"bos/eos token {before + after} cannot be added to a text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(token, vocab.ids[token]) for token in dict.fromkeys(before + after)],
    )


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CorruptFileError(f"{key} is missing or not a list of strings")
    return values


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise CorruptFileError(f"{key}={str(value)[:80]!r} is not a bool")
    return value

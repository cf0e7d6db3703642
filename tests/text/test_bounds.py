"""What may be said of a text before it is tokenized: how few tokens it may have, and where special text stands."""

import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from jaxserve.text.tokenizer import Tokenizer, _any_of

texts = st.text("ab|<", min_size=1, max_size=6)


@given(st.lists(texts, min_size=1, max_size=12, unique=True), st.text("ab|<>", max_size=40))
def test_pattern_finds_the_longest_text_at_every_place(alternatives, text):
    plain = re.compile("|".join(map(re.escape, sorted(alternatives, key=len, reverse=True))))
    assert re.findall(_any_of(alternatives), text) == plain.findall(text)


def test_pattern_of_hundreds_of_texts_that_begin_alike_looks_at_the_beginning_once():
    names = [f"<|reserved_special_token_{i}|>" for i in range(250)]
    pattern = _any_of(names)
    assert pattern.count("reserved") == 1
    assert all(re.fullmatch(pattern, name) for name in names)


def test_no_text_has_fewer_tokens_than_its_length_tells(byte_level):
    longest = byte_level.max_token_chars
    assert longest is not None
    for text in ("The quick brown fox", " " * 500, "é" * 300, "😀" * 100, "日本語" * 100, "\u0300" * 50, "\x00" * 50):
        assert len(byte_level.encode(text, add_special_tokens=False)) >= len(text) / longest


@pytest.mark.parametrize("change", ["normalizer", "lstrip", "rstrip", "removed", "whitespace", "unknown", "words"])
def test_nothing_is_told_where_one_token_may_stand_for_any_number_of_characters(byte_level_backend, change):
    """Each of these swallows characters: a thousand of them are a few tokens."""
    backend, many = byte_level_backend, " " * 1000
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match change:
        case "normalizer":
            backend.normalizer = normalizers.Strip()
        case "lstrip" | "rstrip":
            backend.add_tokens([AddedToken("<mask>", **{change: True})])
            many = many + "<mask>" if change == "lstrip" else "<mask>" + many
        case "removed":
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), split])
        case "whitespace":
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
        case "unknown":
            vocab = {"<unk>": 0, "a": 1}
            backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
            many = "b" * 1000
        case "words":
            backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = Tokenizer(backend)
    assert len(tokenizer.encode(many, add_special_tokens=False)) < 10
    assert tokenizer.max_token_chars is None

"""Log probabilities in OpenAI's two formats, and where tokens begin in a text; on a byte-level tokenizer."""

import math
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxserve.request import Logprob, SamplingParams
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from server.rest.logprobs import (
    TextOffsets,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    prompt_offsets,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


CHOSEN_UNLIKELY = {7: Logprob(-9.0, 40, "g"), 5: Logprob(-0.5, 1, "e"), 6: Logprob(-1.5, 2, "f")}
CHOSEN_SECOND = {6: Logprob(-1.5, 2, "f"), 5: Logprob(-0.5, 1, "e")}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    names = TokenNames(tokenizer, as_ids=False)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    joined = b"".join(bytes(names.bytes(token) or ()) for token in ids)
    assert joined == text.encode()


def test_byte_fallback_tokens_have_their_byte() -> None:
    vocabulary = {"a": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "\u65e5": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    byte_fallback = Tokenizer(backend)
    assert [byte_fallback.token_bytes(1 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert byte_fallback.token_bytes(257) == "\u65e5".encode()


def test_likeliest_tokens_are_k_and_in_order_whatever_was_chosen(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer, as_ids=False)
    unlikely, second = chat_logprobs([CHOSEN_UNLIKELY, CHOSEN_SECOND], 2, names)["content"]
    assert (unlikely["token"], second["token"]) == ("g", "f")
    for entry in (unlikely, second):
        assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("e", -0.5), ("f", -1.5)]
    assert chat_logprobs([{7: Logprob(-9.0, 40, "g")}], 0, names)["content"][0]["top_logprobs"] == []


def test_minus_infinity_becomes_minus_9999(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer, as_ids=False)
    position = {7: Logprob(-math.inf, 40, "g"), 5: Logprob(-0.5, 1, "e")}
    assert completion_logprobs([7], [position], [0], names)["token_logprobs"] == [-9999.0]
    assert chat_logprobs([position], 1, names)["content"][0]["logprob"] == -9999.0
    assert prompt_logprobs([None, position]) == [
        None,
        {
            "7": {"logprob": -9999.0, "rank": 40, "decoded_token": "g"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "e"},
        },
    ]


def test_tokens_with_one_text_leave_the_likeliest(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer, as_ids=False)
    position = {8: Logprob(-3.0, 3, "\ufffd"), 5: Logprob(-0.5, 1, "\ufffd"), 6: Logprob(-1.5, 2, "f")}
    assert completion_logprobs([8], [position], [0], names)["top_logprobs"] == [{"\ufffd": -0.5, "f": -1.5}]
    by_id = completion_logprobs([8], [position], [0], TokenNames(tokenizer, as_ids=True))
    assert by_id["tokens"] == ["token_id:8"]
    assert by_id["top_logprobs"] == [{"token_id:5": -0.5, "token_id:6": -1.5, "token_id:8": -3.0}]


@given(st.lists(st.integers(0, 511), min_size=1), st.integers(0, 9))
def test_offsets_never_fall_and_point_at_whole_tokens(tokenizer: Tokenizer, ids: list[int], start: int) -> None:
    params = SamplingParams()
    text = "." * start + tokenizer.decode(ids)
    offsets = TextOffsets(tokenizer, params, [], start).add(ids)
    assert offsets[0] == start and offsets == sorted(offsets) and offsets[-1] <= len(text)
    for token, offset in zip(ids, offsets, strict=True):
        own = tokenizer.token_text(token)
        if "\ufffd" not in own and token not in tokenizer.special_ids:
            assert text[offset : offset + len(own)] == own


@given(st.lists(st.integers(0, 511), min_size=1), st.data())
def test_offsets_do_not_depend_on_how_tokens_arrive(tokenizer: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    pieces = TextOffsets(tokenizer, SamplingParams(), [], 0)
    assert pieces.add(ids[:cut]) + pieces.add(ids[cut:]) == TextOffsets(tokenizer, SamplingParams(), [], 0).add(ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_prompt_offsets_skip_special_tokens_the_text_does_not_spell(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    plain = prompt_offsets(tokenizer, ids, text)
    assert prompt_offsets(tokenizer, [0, *ids], text) == [0, *plain]
    for token, offset in zip(ids, plain, strict=True):
        own = tokenizer.token_text(token)
        if "\ufffd" not in own:
            assert text[offset : offset + len(own)] == own

"""Incremental text equals the text decoded at once, however tokens are grouped; stop strings cut where they should."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.request import SamplingParams
from jaxserve.text.detokenizer import IncrementalDetokenizer, OutputText, StopChecker

BROKEN = "\ufffd"
QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(
    st.one_of(st.sampled_from("abc STOP日本語你好😀👩\u200d👧äöß\n—"), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)


def split(items: list, cuts: list[int]) -> list[list]:
    """`items` in consecutive groups, cut at `cuts` (taken modulo the length)."""
    edges = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[start:stop] for start, stop in pairwise(edges)]


def run(tokenizer, params, prompt, groups):
    """Feed the groups; return (deltas, stop, OutputText) after the flush."""
    state = OutputText(tokenizer, params, prompt)
    deltas, stop = [], None
    for group in groups:
        delta, stop = state.append(group)
        deltas.append(delta)
        assert state.text == "".join(deltas)
        if stop is not None:
            break
    deltas.append(state.flush())
    assert state.text == "".join(deltas)
    return deltas, stop, state


def rest(tokenizer, prompt, output, **options):
    """What decoding everything at once says the output's text is."""
    return tokenizer.decode(prompt + output, **options)[len(tokenizer.decode(prompt, **options)) :]


@QUICK
@given(text=TEXT, prompt=TEXT, cuts=st.lists(st.integers(0, 99), max_size=8))
def test_streamed_text_equals_text_decoded_at_once(byte_level, text, prompt, cuts):
    prompt_ids = byte_level.encode(prompt)
    ids = byte_level.encode(text, parse_special=False)
    _, _, state = run(byte_level, SamplingParams(), prompt_ids, split(ids, cuts))
    assert state.text == text.rstrip(BROKEN)
    assert state.tokens_used == len(ids)


@QUICK
@given(text=TEXT, cuts=st.lists(st.integers(0, 99), max_size=8))
def test_streamed_text_equals_text_decoded_at_once_for_default_model(default_model, text, cuts):
    prompt = default_model.encode("Once upon")
    ids = default_model.encode(text)
    _, _, state = run(default_model, SamplingParams(), prompt, split(ids, cuts))
    assert state.text == rest(default_model, prompt, ids).rstrip(BROKEN)


@QUICK
@given(data=st.data())
def test_any_token_ids_give_the_same_text_in_any_grouping(byte_level, byte_fallback, data):
    tokenizer = data.draw(st.sampled_from([byte_level, byte_fallback]))
    token = st.one_of(st.integers(0, 30), st.integers(0, tokenizer.vocab_size + 3))
    ids = data.draw(st.lists(token, max_size=60))
    prompt = data.draw(st.lists(token, max_size=12))
    params = SamplingParams(
        skip_special_tokens=data.draw(st.booleans()), spaces_between_special_tokens=data.draw(st.booleans())
    )
    whole = IncrementalDetokenizer(tokenizer, params, prompt)
    assert whole.append(ids) == whole.text
    for cuts in ([], list(range(len(ids))), data.draw(st.lists(st.integers(0, 99), max_size=8))):
        grouped = IncrementalDetokenizer(tokenizer, params, prompt)
        assert "".join(grouped.append(group) for group in split(ids, cuts)) == grouped.text == whole.text


@QUICK
@given(data=st.data(), skip=st.booleans())
def test_any_token_ids_give_the_decoded_text_less_its_broken_end(byte_level, data, skip):
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=80))
    detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(skip_special_tokens=skip), [])
    for i in range(len(ids)):
        detokenizer.append(ids[i : i + 1])
        full = byte_level.decode(ids[: i + 1], skip_special_tokens=skip)
        assert full.startswith(detokenizer.text)
        assert set(full[len(detokenizer.text) :]) <= {BROKEN}


def bytes_as_ids(tokenizer, data: bytes) -> list[int]:
    """One token per byte, for a byte-level or a byte-fallback tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    vocab = tokenizer._backend.get_vocab()
    return [vocab[f"<0x{byte:02X}>"] if "<0x00>" in vocab else vocab[names[byte]] for byte in data]


@pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback"])
def test_no_half_character_is_ever_emitted(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(), tokenizer.encode("a"))
    deltas = [detokenizer.append([token]) for token in bytes_as_ids(tokenizer, "é你😀x".encode())]
    assert deltas == ["", "é", "", "", "你", "", "", "", "😀", "x"]


@pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback"])
def test_incomplete_character_at_the_end_is_dropped(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    ids = bytes_as_ids(tokenizer, b"ab" + "😀".encode()[:3])
    deltas, _, state = run(tokenizer, SamplingParams(), [], [ids])
    assert state.text == "ab" and deltas == ["ab", ""]


def test_character_completed_by_a_token_that_starts_another_is_emitted_at_once(byte_level_backend):
    from jaxserve.text.tokenizer import Tokenizer

    tokens = bytes_as_ids(Tokenizer(byte_level_backend), "你好".encode())
    names = [byte_level_backend.id_to_token(token) for token in tokens]
    joint = "".join(names[2:4])  # the last byte of one character and the first of the next
    byte_level_backend.add_tokens([joint])
    tokenizer = Tokenizer(byte_level_backend)
    ids = [*tokens[:2], byte_level_backend.token_to_id(joint), *tokens[4:]]
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(), [])
    assert [detokenizer.append([token]) for token in ids] == ["", "", "你", "", "好"]


def test_first_token_keeps_its_leading_space(byte_fallback):
    cat = byte_fallback._backend.token_to_id("\u2581cat")
    assert byte_fallback.decode([cat]) == "cat"
    after_text = IncrementalDetokenizer(byte_fallback, SamplingParams(), byte_fallback.encode("the"))
    assert after_text.append([cat]) == " cat"
    after_bos = IncrementalDetokenizer(byte_fallback, SamplingParams(), [1])
    assert after_bos.append([cat]) == "cat"
    many_specials = IncrementalDetokenizer(byte_fallback, SamplingParams(), byte_fallback.encode("the") + [1] * 50)
    assert many_specials.append([cat]) == " cat"


def test_leading_space_survives_many_skipped_tokens(byte_fallback):
    cat = byte_fallback._backend.token_to_id("\u2581cat")
    detokenizer = IncrementalDetokenizer(byte_fallback, SamplingParams(), byte_fallback.encode("the"))
    assert detokenizer.append([1] * 100 + [cat]) == " cat"


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        ("你".encode()[:2], "你".encode()[2:] + b"a", "你a"),  # the output completes the character
        ("你".encode()[:2], b"abc", "abc"),  # it does not: what is broken is the prompt's
        (BROKEN.encode(), b"abc", "abc"),  # a genuine U+FFFD is the prompt's, too
        ((BROKEN * 3).encode(), "你".encode(), "你"),
        (b"\xff\xff\xff", b"abc", "abc"),
    ],
)
def test_prompt_that_ends_in_a_broken_character_is_not_repeated(byte_level, prompt, output, text):
    prompt_ids = byte_level.encode("Hello ") + bytes_as_ids(byte_level, prompt)
    assert run(byte_level, SamplingParams(), prompt_ids, [bytes_as_ids(byte_level, output)])[2].text == text


def test_decoder_that_rewrites_earlier_text_neither_fails_nor_repeats(byte_fallback):
    """A run of byte tokens decodes all or nothing: 'B' turns into U+FFFD when a wrong byte follows."""
    from tokenizers.decoders import DecodeStream

    ids = [*bytes_as_ids(byte_fallback, b"B\xe4A"), byte_fallback._backend.token_to_id("\u00bb")]
    stream = DecodeStream(skip_special_tokens=True)
    a = byte_fallback._backend.token_to_id("a")
    with pytest.raises(Exception, match="Invalid prefix"):
        for token in [a, *ids]:
            stream.step(byte_fallback._backend, token)
    detokenizer = IncrementalDetokenizer(byte_fallback, SamplingParams(), [a])
    assert [detokenizer.append([token]) for token in ids] == ["B", "", "", BROKEN * 2 + "\u00bb"]


def test_long_runs_without_text_keep_the_window_short(byte_level):
    for token in (byte_level.eos_token_id, bytes_as_ids(byte_level, b"\x80")[0], 10**6):
        detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(), [])
        for _ in range(200):
            detokenizer.append([token])
            assert len(detokenizer._context) + len(detokenizer._pending) <= 40
    assert detokenizer.append(byte_level.encode("ok")) == "ok"


def test_skip_special_tokens_decides_whether_they_are_text(byte_level):
    ids = [*byte_level.encode("a"), byte_level.eos_token_id, byte_level.eos_token_id]
    assert run(byte_level, SamplingParams(), [], [ids])[2].text == "a"
    assert run(byte_level, SamplingParams(skip_special_tokens=False), [], [ids])[2].text == "a<|end|><|end|>"


def test_spaces_between_special_tokens_follow_the_parameter(byte_level_backend):
    from tokenizers.decoders import WordPiece

    from jaxserve.text.tokenizer import Tokenizer

    byte_level_backend.decoder = WordPiece(cleanup=False)  # a decoder that puts spaces between tokens
    tokenizer = Tokenizer(byte_level_backend, {"eos_token": "<|end|>"})
    end, a = tokenizer.eos_token_id, tokenizer.encode("a")[0]
    ids = [a, end, end, a]
    for spaces, text in ((True, "a <|end|> <|end|> a"), (False, "a <|end|><|end|> a")):
        params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert tokenizer.decode(ids, False, spaces) == text
        for groups in ([ids], [[token] for token in ids]):
            assert run(tokenizer, params, [], groups)[2].text == text


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first, the longest of those; by brute force."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending)), end
    return None


@QUICK
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 99), max_size=8),
    include=st.booleans(),
)
def test_stop_checker_finds_the_first_stop_string(text, stops, cuts, include):
    checker = StopChecker(tuple(stops), include)
    released, fed = "", 0
    for piece in split(list(text), cuts):
        released += checker.append("".join(piece))
        fed += len(piece)
        if checker.found is not None:
            break
        held = text[len(released) : fed]
        assert text[:fed] == released + held
        longest = max((n for s in stops for n in range(len(s)) if text[:fed].endswith(s[:n])), default=0)
        assert len(held) == longest  # everything that can be released is
    released += checker.finish()
    match = first_stop(text, stops)
    if match is None:
        assert checker.found is None and released == text
    else:
        assert checker.found == text[match[0] : match[1]]
        assert released == text[: match[1] if include else match[0]]


@QUICK
@given(data=st.data())
def test_stop_text_and_tokens_used_do_not_depend_on_grouping(byte_level, default_model, data):
    tokenizer = data.draw(st.sampled_from([byte_level, default_model]))
    ids = tokenizer.encode(data.draw(TEXT))
    text = tokenizer.decode(ids)  # the default model's vocabulary lacks a few bytes
    inside = [text[i : i + n] for i in range(len(text)) for n in (1, 2, 5)]
    stops = data.draw(st.lists(st.one_of(st.sampled_from(["STOP", " ", *inside]), TEXT.filter(bool)), max_size=4))
    params = SamplingParams(
        stop=stops,
        min_tokens=data.draw(st.integers(0, 6)),
        max_tokens=None,
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    prompt = tokenizer.encode("Hi")
    _, stop, state = run(tokenizer, params, prompt, [[token] for token in ids])
    cuts = data.draw(st.lists(st.integers(0, 99), max_size=8))
    for groups in ([ids], split(ids, cuts)):
        _, other_stop, other = run(tokenizer, params, prompt, groups)
        assert (other_stop, other.text, other.tokens_used) == (stop, state.text, state.tokens_used)
    if stop is None:
        assert state.text == text.rstrip(BROKEN) and state.tokens_used == len(ids)
    else:
        assert state.tokens_used > params.min_tokens
        assert text.startswith(state.text)
        if params.include_stop_str_in_output:
            assert state.text.endswith(stop)
        else:
            assert text[len(state.text) :].startswith(stop)


def test_stop_string_spanning_tokens_is_never_half_emitted(byte_level):
    ids = bytes_as_ids(byte_level, b"go STOP now")
    state = OutputText(byte_level, SamplingParams(stop="STOP"), [])
    steps = [state.append([token]) for token in ids[:7]]
    assert [delta for delta, _ in steps] == ["g", "o", " ", "", "", "", ""]
    assert [stop for _, stop in steps] == [None] * 6 + ["STOP"]
    assert (state.text, state.tokens_used) == ("go ", 7)
    assert state.append(ids[7:]) == ("", "STOP")
    assert (state.flush(), state.text, state.tokens_used) == ("", "go ", 7)


def test_held_text_is_released_when_it_turns_out_harmless(byte_level):
    state = OutputText(byte_level, SamplingParams(stop=["STOP"]), [])
    steps = [state.append([token])[0] for token in bytes_as_ids(byte_level, b"STSTOX STO")]
    assert steps == ["", "", "ST", "", "", "STOX", " ", "", "", ""]
    assert state.flush() == "STO"
    assert state.text == "STSTOX STO"


def test_earliest_of_several_stop_strings_in_one_append_wins(byte_level):
    ids = bytes_as_ids(byte_level, b"one END two STOP three")
    for stops in (["STOP", "END"], ["END", "STOP"]):
        _, stop, state = run(byte_level, SamplingParams(stop=stops), [], [ids])
        assert (stop, state.text, state.tokens_used) == ("END", "one ", 7)


def test_include_stop_str_in_output_keeps_it_and_nothing_after_it(byte_level):
    joint = byte_level.encode(" brown fox jumps")
    params = SamplingParams(stop="row", include_stop_str_in_output=True)
    _, stop, state = run(byte_level, params, [], [joint])
    assert (stop, state.text) == ("row", " brow")


def test_stop_string_does_not_count_within_min_tokens(byte_level):
    ids = bytes_as_ids(byte_level, b"xxaxxa")
    for min_tokens, used, text in ((0, 1, ""), (1, 2, "x"), (2, 4, "xxa"), (5, 6, "xxaxxa")):
        params = SamplingParams(stop="x", min_tokens=min_tokens)
        _, stop, state = run(byte_level, params, [], [ids])
        assert (state.tokens_used, state.text, stop) == (used, text, "x" if min_tokens < 5 else None)


def test_stop_string_in_the_prompt_does_not_count(byte_level):
    _, stop, state = run(
        byte_level, SamplingParams(stop="STOP"), byte_level.encode("STOP ST"), [[*byte_level.encode("OP")]]
    )
    assert (stop, state.text) == (None, "OP")


def test_without_detokenizing_only_tokens_are_counted(byte_level):
    _, stop, state = run(byte_level, SamplingParams(detokenize=False), [], [[5, 6], [7]])
    assert (stop, state.text, state.tokens_used) == (None, "", 3)

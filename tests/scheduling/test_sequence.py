import pytest

from jaxserve.request import TokenLogprobs
from jaxserve.scheduling.prefix import page_hash, root_hash
from jaxserve.scheduling.sequence import Sequence


@pytest.fixture
def make_sequence(make_request):
    def make(prompt, index=0, final_length=100, **kwargs):
        return Sequence(make_request("a", prompt, **kwargs), index, (0, 0), final_length, root_hash("x"))

    return make


def test_work_is_what_is_known_or_pending_and_not_computed(make_sequence):
    sequence = make_sequence([1, 2, 3])
    assert sequence.work == 3
    sequence.computed, sequence.pending = 3, 1
    assert sequence.work == 1 and sequence.num_generated == 1


def test_sequence_at_its_final_length_is_not_ready(make_sequence):
    sequence = make_sequence([1, 2, 3], final_length=5)
    sequence.pending = 1
    assert sequence.ready
    sequence.pending = 2
    assert not sequence.ready


@pytest.mark.parametrize(("words", "needs_sync"), [((), False), (((1,), (2,)), False), (((1,), (2, 3)), True)])
def test_only_bad_words_of_several_tokens_need_the_last_token(words, needs_sync, make_sequence):
    sequence = make_sequence([1], bad_words=words)
    assert sequence.needs_sync is needs_sync
    sequence.pending = 1
    assert sequence.ready is not needs_sync


def test_page_hashes_are_chained_and_made_once(make_sequence):
    sequence = make_sequence([1, 2, 3, 4, 5])
    second = page_hash(page_hash(root_hash("x"), [1, 2]), [3, 4])
    assert sequence.page_hash(1, 2) == second
    assert len(sequence.page_hashes) == 2 and sequence.page_hash(1, 2) is sequence.page_hashes[1]
    with pytest.raises(AssertionError, match="page 2 is not full"):
        sequence.page_hash(2, 2)


@pytest.mark.parametrize(
    ("token", "sampling", "generated", "end"),
    [
        (7, {}, 0, ("stop", None)),
        (7, {"ignore_eos": True}, 0, None),
        (7, {"ignore_eos": True, "stop_token_ids": [7]}, 0, ("stop", 7)),
        (9, {"stop_token_ids": [8, 9]}, 0, ("stop", 9)),
        (9, {"stop_token_ids": [9], "min_tokens": 2}, 1, None),
        (9, {"stop_token_ids": [9], "min_tokens": 2}, 2, ("stop", 9)),
        (7, {"min_tokens": 2}, 1, None),
        (7, {"min_tokens": 2}, 2, ("stop", None)),
        (7, {"min_tokens": 5}, 3, ("length", None)),
        (5, {}, 2, None),
        (5, {}, 3, ("length", None)),
    ],
)
def test_end_is_told_by_the_token_and_the_count(token, sampling, generated, end, make_sequence):
    sequence = make_sequence([1, 2], final_length=6, **sampling)
    sequence.tokens += [5] * generated
    assert sequence.end_at(token) == end


def test_prompt_logprobs_are_sent_once_whatever_is_computed_again(make_sequence):
    entries = [TokenLogprobs(i, -1.0, 1, [], []) for i in range(5)]  # entry i: prompt token i + 1
    sequence = make_sequence([9, 0, 1, 2, 3, 4], prompt_logprobs=0)
    assert sequence.prompt_logprobs_left == 5
    assert sequence.take_unsent(0, entries[:2]) == entries[:2]
    assert sequence.take_unsent(0, entries[:1]) is None
    assert sequence.take_unsent(1, entries[1:4]) == entries[2:4]
    assert sequence.take_unsent(4, entries[4:]) == entries[4:]
    assert sequence.prompt_logprobs_left == 0 and sequence.take_unsent(0, entries) is None


def test_only_sample_0_owes_prompt_logprobs(make_sequence):
    assert make_sequence([1, 2], prompt_logprobs=3, n=2).prompt_logprobs_left == 1
    assert make_sequence([1, 2], index=1, prompt_logprobs=3, n=2).prompt_logprobs_left == 0
    assert make_sequence([1, 2]).prompt_logprobs_left == 0

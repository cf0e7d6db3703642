"""The pytrees that cross to the device, and the glossary of axes used in every shape comment.

    T  tokens of a step            R  rows of a step (one sequence each)      S  slots (sequences that can run at once)
    M  pages a slot can hold       P  tokens a page holds                     N  pages of the pool, per layer
    L  layers                      H, Hkv  query and KV heads                 D  head size
    V  vocabulary                  K  top logprobs kept                       U  page-table updates a step can carry

All are padded to static sizes. Padding tokens write to page 0, the waste page; padding rows carry slot S, which every
scatter drops. An absent feature is a zero-length axis, never None.
"""

from typing import Generic, TypeVar

from flax import struct
from jax import Array

Leaf = TypeVar("Leaf")  # Array; jax.ShapeDtypeStruct where programs are compiled without data


@struct.dataclass
class SlotState(Generic[Leaf]):
    """What the device remembers of each running sequence between steps; donated to every step."""

    last_token: Leaf  # i32[S] the token sampled last: the next step's input, before the host knows it
    page_table: Leaf  # i32[S, M] pages of the sequence in order
    token_counts: Leaf  # i32[S, V] times generated, plus PROMPT_FLAG if in the prompt; only rows with penalties
    logit_bias: Leaf  # f32[S, V] added to the logits, -inf = forbidden; only rows with such parameters


@struct.dataclass
class StepBatch:
    """One step's rows."""

    token_ids: Array  # i32[T] -1: SlotState.last_token of the row's slot
    positions: Array  # i32[T]
    token_row: Array  # i32[T]
    query_start: Array  # i32[R+1] row r's tokens are query_start[r]..query_start[r+1]-1
    kv_lens: Array  # i32[R] tokens in cache after this step; 0 for padding rows
    slots: Array  # i32[R] padding rows: S
    samples: Array  # i32[R] 1: the row's last token gets a sampled successor
    update_slot: Array  # i32[U] padding: S
    update_index: Array  # i32[U] position in the slot's page table
    update_page: Array  # i32[U] page that stands there from now on


@struct.dataclass
class SamplingState:
    """How each row of a step is sampled. Zero rows in a "greedy" step."""

    temperature: Array  # f32[R] 0 = greedy
    top_p: Array  # f32[R]
    min_p: Array  # f32[R]
    top_k: Array  # i32[R]
    seeds: Array  # u32[R]
    presence_penalty: Array  # f32[R]
    frequency_penalty: Array  # f32[R]
    repetition_penalty: Array  # f32[R]
    adjusts: Array  # i32[R] 1: the row has token_counts and logit_bias in its slot
    wants_logprobs: Array  # i32[R]
    prompt_targets: Array  # i32[T] token whose prompt logprob is wanted at this position; -1 = none


@struct.dataclass
class Logprobs:
    """Raw-logit log probabilities (natural log) of N tokens; zeros where none were asked for."""

    chosen: Array  # f32[N]
    rank: Array  # i32[N]
    top_ids: Array  # i32[N, K]
    top: Array  # f32[N, K]


@struct.dataclass
class StepOutput:
    tokens: Array  # i32[R] sampled tokens; -1: the logits held a NaN
    logprobs: Logprobs  # of the R sampled tokens; zero rows unless the step is "full"
    prompt_logprobs: Logprobs  # of the T prompt targets; zero rows unless the step is "full" and mixed

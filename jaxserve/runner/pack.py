"""StepPlan to packed arrays: where scheduling meets the device, and where all padding happens.

Work is one pass over the rows, plus the tokens of prompt chunks; nothing grows with the context.
"""

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

import numpy as np

from jaxserve import shapes
from jaxserve.runner.layout import SAMPLING_FIELDS, host_views
from jaxserve.runner.slot_params import SlotParams, banned_now
from jaxserve.scheduling.plan import StepPlan
from jaxserve.shapes import Sampler, StepShape


@dataclass(frozen=True)
class PackedStep:
    """One step, ready to be sent."""

    shape: StepShape
    packed: np.ndarray  # i32[...], see runner/layout
    bitmask: np.ndarray | None  # u32[R, ceil(V/32)] allowed tokens; None = all
    page_rows: list[tuple[int, list[int]]]  # (slot, pages): whole page-table rows to write before the step
    wants_logprobs: bool
    wants_prompt_logprobs: bool


def pack(
    plan: StepPlan, slot_params: SlotParams, ladder: AnySequence[StepShape], *, num_slots: int, page_size: int
) -> PackedStep:
    """Fills the smallest step shape that holds the plan."""
    rows = plan.rows
    num_rows, num_tokens = len(rows), plan.num_tokens
    slots = np.fromiter((row.slot for row in rows), np.int32, num_rows)
    starts = np.fromiter((row.start for row in rows), np.int32, num_rows)
    counts = np.fromiter((row.count for row in rows), np.int32, num_rows)

    varying: list[int] = np.flatnonzero(slot_params.varies[slots]).tolist()
    banned = {i: tokens for i in varying if (tokens := banned_now(rows[i].sequence, rows[i].num_generated))}
    prompt_rows = [i for i in varying if rows[i].wants_prompt_logprobs]
    wants_logprobs = bool(slot_params.columns["wants_logprobs"][slots].any())
    sampler: Sampler = "sampled" if slot_params.draws[slots].any() or banned else "greedy"
    if wants_logprobs or prompt_rows:
        sampler = "full"
    # A decode shape returns no prompt logprobs: its one-token rows take a mixed shape instead.
    size = max(num_tokens, num_rows + 1) if prompt_rows else num_tokens
    shape = shapes.choose(ladder, size, num_rows, sampler=sampler)

    buffer, views = host_views(shape, page_size)
    token_ids = views["token_ids"]
    for i in range(plan.num_single):
        row = rows[i]
        token_ids[i] = -1 if row.feedback else row.sequence.tokens[row.start]
    end = np.cumsum(counts)
    begin = end - counts
    for i in range(plan.num_single, num_rows):
        row = rows[i]
        token_ids[begin[i] : end[i]] = row.sequence.tokens[row.start : row.start + row.count]
    views["token_row"][:num_tokens] = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
    views["token_row"][num_tokens:] = np.arange(num_tokens, shape.tokens) if shape.decode else shape.rows - 1
    views["positions"][:num_tokens] = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - begin, counts)
    views["query_start"][1 : num_rows + 1] = end
    views["query_start"][num_rows + 1 :] = num_tokens
    views["kv_lens"][:num_rows] = starts + counts
    views["slots"][:num_rows] = slots
    views["slots"][num_rows:] = num_slots
    views["samples"][:num_rows] = [row.samples for row in rows]
    page_rows = _page_updates(plan, views, num_slots)
    if shape.sampling_rows:
        for name, _ in SAMPLING_FIELDS:
            views[name][:num_rows] = slot_params.columns[name][slots]
    if shape.prompt_targets:
        views["prompt_targets"][:] = -1
        for i in prompt_rows:
            row = rows[i]
            targets = row.sequence.tokens[row.start + 1 : min(row.start + row.count + 1, row.sequence.num_prompt)]
            views["prompt_targets"][begin[i] : begin[i] + len(targets)] = targets
    return PackedStep(
        shape=shape,
        packed=buffer,
        bitmask=_bitmask(banned, shape.rows, slot_params.vocab_size) if banned else None,
        page_rows=page_rows,
        wants_logprobs=wants_logprobs,
        wants_prompt_logprobs=bool(prompt_rows),
    )


def _page_updates(plan: StepPlan, views: dict[str, np.ndarray], num_slots: int) -> list[tuple[int, list[int]]]:
    """Writes new pages into the step's updates; rows that bring more than fit are returned to be written whole."""
    update_slot, update_index, update_page = views["update_slot"], views["update_index"], views["update_page"]
    update_slot[:] = num_slots
    whole: list[tuple[int, list[int]]] = []
    used = 0
    for row in plan.rows:
        pages = row.sequence.pages
        known = row.new_pages_from
        new = len(pages) - known
        if not new:
            continue
        if used + new > len(update_slot):
            whole.append((row.slot, list(pages)))
            continue
        update_slot[used : used + new] = row.slot
        update_index[used : used + new] = range(known, len(pages))
        update_page[used : used + new] = pages[known:]
        used += new
    return whole


def _bitmask(banned: dict[int, list[int]], num_rows: int, vocab_size: int) -> np.ndarray:
    mask = np.full((num_rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for row, tokens in banned.items():
        for token in tokens:
            mask[row, token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    return mask

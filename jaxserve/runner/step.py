"""The step: one jitted function of donated state that advances every row of a batch by one plan.

    kv, slots, out = step(params, kv, slots, packed, bitmask)

Beside it, two small programs that write one slot's state outside of a step.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.batch import SlotState, StepOutput
from jaxserve.models import decoder
from jaxserve.runner import sampler
from jaxserve.runner.dimensions import Dimensions
from jaxserve.runner.layout import unpack
from jaxserve.shapes import StepShape
from pallas_kernels.storage import KVPool


@dataclass(frozen=True)
class StepProgram:
    """Everything static that a step is traced with."""

    dimensions: Dimensions
    shape: StepShape

    def __call__(
        self,
        params: decoder.DecoderParams[Array],
        kv: KVPool[Array],
        slots: SlotState[Array],
        packed: Array,
        bitmask: Array,
    ) -> tuple[KVPool[Array], SlotState[Array], StepOutput]:
        """Advances the batch by one step; kv and slots are donated.

        packed: i32[...], see runner/layout. bitmask: u32[R, ceil(V/32)] of allowed tokens; zero rows when greedy.
        """
        sizes, page_size = self.dimensions, self.dimensions.page_size
        batch, sampling = unpack(packed, self.shape, page_size)
        num_tokens = self.shape.tokens
        with jax.named_scope("inputs"):
            page_table = slots.page_table.at[batch.update_slot, batch.update_index].set(batch.update_page, mode="drop")
            row_pages = page_table.at[batch.slots].get(mode="fill", fill_value=0)
            fed_back = slots.last_token.at[batch.slots[batch.token_row]].get(mode="fill", fill_value=0)
            token_ids = jnp.where(batch.token_ids >= 0, batch.token_ids, fed_back)
            page = row_pages[batch.token_row, batch.positions // page_size]
            real = jnp.arange(num_tokens, dtype=jnp.int32) < batch.query_start[-1]
            kv_slots = jnp.where(real, page * page_size + batch.positions % page_size, 0)
            attention = sizes.kernels.prepare_attention(
                row_pages, batch.query_start, batch.kv_lens, batch.positions, batch.token_row
            )
        hidden, kv = decoder.forward(
            params,
            sizes.model,
            sizes.kernels,
            token_ids=token_ids,
            positions=batch.positions,
            kv_slots=kv_slots,
            attention=attention,
            kv=kv,
            max_model_len=sizes.max_model_len,
        )
        with jax.named_scope("logits"):
            if self.shape.decode:
                last_hidden = hidden
            else:
                last_hidden = hidden[jnp.maximum(batch.query_start[1:] - 1, 0)]
            logits = decoder.logits(params, sizes.model, last_hidden)
        with jax.named_scope("sample"):
            num_slots = slots.last_token.shape[0]
            sampled_slots = jnp.where(batch.samples == 1, batch.slots, num_slots)
            counts = slots.token_counts
            top = sizes.max_logprobs
            prompt = sampler.no_logprobs(0, top)
            logprobs = sampler.no_logprobs(0, top)
            if self.shape.sampler == "greedy":
                tokens = sampler.greedy(logits)
            else:
                tokens = sampler.sample(
                    logits, sampling, slots, batch.slots, batch.kv_lens, bitmask, sample=sizes.kernels.sample
                )
                counts = sampler.count_tokens(slots, sampled_slots, tokens, sampling.adjusts)
            if self.shape.sampler == "full":
                logprobs = jax.lax.cond(
                    jnp.any(sampling.wants_logprobs == 1),
                    lambda: sampler.token_logprobs(logits, tokens, top),
                    lambda: sampler.no_logprobs(self.shape.rows, top),
                )
            if self.shape.prompt_targets:
                prompt = sampler.prompt_logprobs(
                    hidden, sampling.prompt_targets, lambda h: decoder.logits(params, sizes.model, h), top
                )
            # A NaN row feeds token 0 back; the host ends that sequence when it reads the -1.
            last_token = slots.last_token.at[sampled_slots].set(jnp.maximum(tokens, 0), mode="drop")
        slots = SlotState(
            last_token=last_token, page_table=page_table, token_counts=counts, logit_bias=slots.logit_bias
        )
        return kv, slots, StepOutput(tokens, logprobs, prompt)


def write_page_row(slots: SlotState[Array], slot: Array, pages: Array) -> SlotState[Array]:
    """Replaces one slot's whole page table; slot i32[], pages i32[M]. slots is donated."""
    return dataclasses.replace(slots, page_table=slots.page_table.at[slot].set(pages))


def write_logit_row(slots: SlotState[Array], slot: Array, counts: Array, bias: Array) -> SlotState[Array]:
    """Replaces one slot's token counts i32[V] and logit bias f32[V]. slots is donated."""
    return dataclasses.replace(
        slots, token_counts=slots.token_counts.at[slot].set(counts), logit_bias=slots.logit_bias.at[slot].set(bias)
    )

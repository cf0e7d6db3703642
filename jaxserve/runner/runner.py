"""Owns what lives on the device (parameters, KV pool, slot state) and advances it, one plan at a time.

`launch` returns as soon as the step is queued; `collect` waits for its tokens. Launching step n+1 before collecting
step n is the whole of overlap: state flows from step to step on the device, in launch order.
"""

import time
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.batch import Logprobs, SlotState, StepOutput
from jaxserve.models.params import DecoderParams
from jaxserve.request import TokenLogprobs
from jaxserve.runner.dimensions import Dimensions
from jaxserve.runner.executables import Executables
from jaxserve.runner.pack import PackedStep, pack
from jaxserve.runner.slot_params import SlotParams
from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.shapes import StepShape
from pallas_kernels.storage import KVPool


@dataclass(frozen=True)
class InFlight:
    """A launched step whose tokens were not read yet."""

    plan: StepPlan
    step: PackedStep
    output: StepOutput


@dataclass
class HostTimes:
    """Seconds of host time the runner spent, in all; a benchmark reads the differences."""

    pack: float = 0.0
    launch: float = 0.0
    wait: float = 0.0  # blocked on the device
    collect: float = 0.0


class Runner:
    """params: on `device`. Raises whatever XLA raises; after that only `reset` may be called."""

    def __init__(
        self,
        dimensions: Dimensions,
        executables: Executables,
        ladder: AnySequence[StepShape],
        params: DecoderParams[jax.Array],
        device: jax.Device,
    ):
        self.dimensions = dimensions
        self.times = HostTimes()
        self._executables = executables
        self._ladder = ladder
        self._params = params
        self._device = device
        self._kv: KVPool[jax.Array]
        self._slots: SlotState[jax.Array]
        self._slot_params: SlotParams
        words = dimensions.bitmask_words
        self._allow_all = {  # rows -> a bitmask that forbids nothing
            rows: self._put(np.full((rows, words), 0xFFFFFFFF, np.uint32))
            for rows in {shape.sampling_rows for shape in ladder}
        }
        self.reset()

    def reset(self) -> None:
        """A blank pool and blank slots; whatever was in them is lost."""
        self._kv = self._slots = None  # type: ignore[assignment]  # frees the old ones before the new are made
        zeros = lambda shape: jnp.zeros(shape.shape, shape.dtype, device=self._device)  # noqa: E731
        self._kv = jax.tree.map(zeros, self.dimensions.kv_shapes())
        self._slots = jax.tree.map(zeros, self.dimensions.slot_shapes())
        self._slot_params = SlotParams(self.dimensions.max_num_seqs, self.dimensions.model.vocab_size)

    def launch(self, plan: StepPlan) -> InFlight:
        """Queues one step on the device. Plans are launched in the order they were made."""
        start = time.perf_counter()
        for sequence in plan.admitted:
            assert sequence.slot is not None
            if self._slot_params.admit(sequence):
                counts, bias = self._slot_params.logit_row(sequence)
                self._slots = self._executables.write_logit_row(
                    self._slots, self._put(np.int32(sequence.slot)), self._put(counts), self._put(bias)
                )
        dimensions = self.dimensions
        step = pack(
            plan,
            self._slot_params,
            self._ladder,
            num_slots=dimensions.max_num_seqs,
            page_size=dimensions.page_size,
        )
        for slot, pages in step.page_rows:
            row = np.zeros(dimensions.pages_per_slot, np.int32)
            row[: len(pages)] = pages
            self._slots = self._executables.write_page_row(self._slots, self._put(np.int32(slot)), self._put(row))
        packed_at = time.perf_counter()
        bitmask = self._allow_all[step.shape.sampling_rows] if step.bitmask is None else self._put(step.bitmask)
        self._kv, self._slots, output = self._executables.steps[step.shape](
            self._params, self._kv, self._slots, self._put(step.packed), bitmask
        )
        output.tokens.copy_to_host_async()
        launched_at = time.perf_counter()
        self.times.pack += packed_at - start
        self.times.launch += launched_at - packed_at
        return InFlight(plan, step, output)

    def collect(self, flight: InFlight) -> StepResult:
        """Waits for a launched step and reads what the plan's rows asked for."""
        start = time.perf_counter()
        tokens = np.asarray(flight.output.tokens)
        waited = time.perf_counter()
        rows = flight.plan.rows
        logprobs = prompt_logprobs = None
        if flight.step.wants_logprobs:
            table = jax.tree.map(np.asarray, flight.output.logprobs)
            logprobs = [
                _token_logprobs(table, r, int(tokens[r]), row.sequence.request.params.logprobs) if row.samples else None
                for r, row in enumerate(rows)
            ]
        if flight.step.wants_prompt_logprobs:
            prompt_logprobs = _prompt_logprobs(flight)
        self.times.wait += waited - start
        self.times.collect += time.perf_counter() - waited
        return StepResult(tokens[: len(rows)], logprobs, prompt_logprobs)

    def _put(self, value: Any) -> jax.Array:
        return jax.device_put(value, self._device)


def _token_logprobs(table: Logprobs, at: int, token: int, top: int | None) -> TokenLogprobs | None:
    if top is None:
        return None
    return TokenLogprobs(
        token_id=token,
        logprob=float(table.chosen[at]),
        rank=int(table.rank[at]),
        top_ids=table.top_ids[at, :top].tolist(),
        top_logprobs=table.top[at, :top].tolist(),
    )


def _prompt_logprobs(flight: InFlight) -> list[list[TokenLogprobs] | None]:
    """One list per row: entry j is about prompt token start + 1 + j."""
    table = jax.tree.map(np.asarray, flight.output.prompt_logprobs)
    results: list[list[TokenLogprobs] | None] = []
    begin = 0
    for row in flight.plan.rows:
        found: list[TokenLogprobs] | None = None
        if row.wants_prompt_logprobs:
            sequence = row.sequence
            last = min(row.start + row.count, sequence.num_prompt - 1)
            top = sequence.request.params.prompt_logprobs
            found = []
            for position in range(row.start, last):
                entry = _token_logprobs(table, begin + position - row.start, sequence.tokens[position + 1], top)
                assert entry is not None
                found.append(entry)
        results.append(found)
        begin += row.count
    return results

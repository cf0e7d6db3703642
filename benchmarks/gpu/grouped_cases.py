"""Products in which every row has a weight of its own: experts of a mixture, and low-rank adapters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.case import TOLERANCE, Case, Problem, chain_length, ids, noise
from gpu.roofline import Work
from gpu.timing import tied
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.grouped_matmul import triton as grouped_triton
from pallas_kernels.lora_matmul import api as lora
from pallas_kernels.lora_matmul import triton as lora_triton


def expert_case(
    tokens: int, inputs: int, outputs: int, experts: int, chosen: int, dtype: str, backends: tuple[str, ...]
) -> Case:
    """Every token through `chosen` of the experts, drawn evenly."""
    block = grouped.block_size(tokens * chosen, experts)
    weights = jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.dtype(dtype))
    return Case(
        op="grouped_matmul",
        name=f"{tokens} tokens, {chosen} of {experts} experts, {inputs} x {outputs}, {dtype}",
        sizes={"tokens": tokens, "inputs": inputs, "outputs": outputs, "experts": experts, "chosen": chosen},
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        backends=backends,
        build=lambda: _expert_problem(tokens, weights, chosen, block),
        unsupported=lambda backend: grouped.unsupported(backend, weights, dtype),
        candidates=lambda backend: list(grouped_triton.candidates(weights, block)),
    )


def adapter_case(
    tokens: int, inputs: int, outputs: int, rank: int, adapters: int, dtype: str, backends: tuple[str, ...]
) -> Case:
    """y + x @ a @ b, with adapters drawn evenly."""
    return Case(
        op="lora_matmul",
        name=f"{tokens} tokens, {adapters} adapters of rank {rank}, {inputs} x {outputs}, {dtype}",
        sizes={"tokens": tokens, "inputs": inputs, "outputs": outputs, "rank": rank, "adapters": adapters},
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        backends=backends,
        build=lambda: _adapter_problem(tokens, inputs, outputs, rank, adapters, jnp.dtype(dtype)),
        unsupported=lambda backend: lora.unsupported(backend, rank, dtype, dtype),
        candidates=lambda backend: _adapter_candidates(tokens, inputs, outputs, rank, adapters, dtype, backend),
    )


def _adapter_candidates(
    tokens: int, inputs: int, outputs: int, rank: int, adapters: int, dtype: str, backend: Backend
) -> list[Any]:
    """Of both products; a candidate for one is measured with the other as it is."""
    plan = jax.eval_shape(lambda: lora.plan_adapters(jnp.zeros((tokens,), jnp.int32), adapters))
    num_blocks, block = plan.block_rows.shape
    a = jax.ShapeDtypeStruct((adapters, inputs, rank), jnp.dtype(dtype))
    b = jax.ShapeDtypeStruct((adapters, rank, outputs), jnp.dtype(dtype))
    first = lora_triton.shrink_candidates(num_blocks, a, block, backend.num_cores)
    return [*first, *lora_triton.expand_candidates(b, block)]


def _expert_problem(tokens: int, weights: jax.ShapeDtypeStruct, chosen: int, block: int) -> Problem:
    experts, inputs, outputs = weights.shape
    random = np.random.default_rng(0)
    choice = np.stack([random.permutation(experts)[:chosen] for _ in range(tokens)])
    read = len(np.unique(choice)) * inputs * outputs
    activations = tokens * (inputs + chosen * outputs)
    work = Work((read + activations) * weights.dtype.itemsize, 2 * tokens * chosen * inputs * outputs)
    calls = min(chain_length(work.bytes), 4)  # each a copy of all experts, which is a gigabyte of Mixtral
    kept = [noise(seed, weights.shape, weights.dtype) / inputs**0.5 for seed in range(calls)]
    x = noise(100, (tokens, inputs), weights.dtype)

    def product(backend: Backend, x: Any, weight: Any, choice: Any) -> Any:
        plan = grouped.plan_groups(choice.reshape(-1), experts, block)
        return grouped.grouped_matmul(x, weight, plan, rows_per_token=chosen, backend=backend)

    def chain(backend: Backend, x: Any, data: Any) -> Any:
        _, kept, choice = data
        plan = grouped.plan_groups(choice.reshape(-1), experts, block)  # made once for the products of a layer
        for weight in kept:
            x = tied(x, grouped.grouped_matmul(x, weight, plan, rows_per_token=chosen, backend=backend))
        return x

    return Problem(
        calls=calls,
        work=work,
        data=(x, kept, ids(choice)),
        state=lambda: x,
        chain=chain,
        result=lambda backend, data: product(backend, data[0], data[1][0], data[2]),
        truth=lambda data: product(REFERENCE, data[0].astype(jnp.float32), data[1][0].astype(jnp.float32), data[2]),
    )


def _adapter_problem(tokens: int, inputs: int, outputs: int, rank: int, adapters: int, dtype: Any) -> Problem:
    of_token = np.random.default_rng(0).integers(0, adapters, tokens)
    used = len(np.unique(of_token))
    moved = used * rank * (inputs + outputs) + tokens * (inputs + 2 * outputs)
    work = Work(moved * dtype.itemsize, 2 * tokens * rank * (inputs + outputs))
    calls = chain_length(work.bytes)
    a = [noise(i, (adapters, inputs, rank), dtype) / inputs**0.5 for i in range(calls)]
    b = [noise(50 + i, (adapters, rank, outputs), dtype) / rank**0.5 for i in range(calls)]
    x, y = noise(100, (tokens, inputs), dtype), noise(101, (tokens, outputs), dtype)

    def product(backend: Backend, x: Any, y: Any, a: Any, b: Any, plan: Any) -> Any:
        return lora.expand(lora.shrink(x, a, plan, backend=backend), b, y, plan, backend=backend)

    def chain(backend: Backend, y: Any, data: Any) -> Any:
        x, _, a, b, of_token = data
        plan = lora.plan_adapters(of_token, adapters)
        for one, other in zip(a, b, strict=True):
            y = product(backend, tied(x, y), y, one, other, plan)
        return y

    def result(backend: Backend, data: Any) -> Any:
        x, y, a, b, of_token = data
        return product(backend, x, y, a[0], b[0], lora.plan_adapters(of_token, adapters))

    def truth(data: Any) -> Any:
        x, y, a, b, of_token = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, data
        )
        return product(REFERENCE, x, y, a[0], b[0], lora.plan_adapters(of_token, adapters))

    return Problem(calls, work, (x, y, a, b, ids(of_token)), lambda: y, chain, result, truth)

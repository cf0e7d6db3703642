"""Products with quantised weights, beside the plain one."""

from typing import Any

import jax
import jax.numpy as jnp

from gpu.case import TOLERANCE, Case, Problem, chain_length, noise
from gpu.roofline import Work
from gpu.timing import tied
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.quant_matmul import api as quant
from pallas_kernels.quant_matmul import triton as quant_triton
from pallas_kernels.quant_matmul.weight import quantise


def plain_case(tokens: int, inputs: int, outputs: int, dtype: str) -> Case:
    """x @ w of `dtype` through XLA: what a quantised weight has to beat."""
    return Case(
        op="matmul",
        name=f"{dtype}, {tokens} x {inputs} x {outputs}",
        sizes={"tokens": tokens, "inputs": inputs, "outputs": outputs},
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        backends=("reference",),
        build=lambda: _problem(tokens, inputs, outputs, dtype, None),
        unsupported=lambda backend: "",
        candidates=lambda backend: [],
        tune=False,
    )


def quant_case(tokens: int, inputs: int, outputs: int, scheme: str, dtype: str, backends: tuple[str, ...]) -> Case:
    """x of `dtype` times a weight kept as `scheme`."""
    kept = jax.eval_shape(lambda: quantise(jnp.zeros((inputs, outputs)), scheme))
    return Case(
        op="quant_matmul",
        name=f"{scheme}, {tokens} x {inputs} x {outputs}",
        sizes={"tokens": tokens, "inputs": inputs, "outputs": outputs, "scheme": scheme},
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        backends=backends,
        build=lambda: _problem(tokens, inputs, outputs, dtype, scheme),
        unsupported=lambda backend: quant.unsupported(backend, kept, dtype),
        candidates=lambda backend: list(quant_triton.candidates(tokens, kept, dtype, backend.num_cores)),
    )


def _problem(tokens: int, inputs: int, outputs: int, dtype: str, scheme: str | None) -> Problem:
    """scheme None: the weight as it is. Between two calls x is copied once, which counts as part of a call."""
    kept = jax.eval_shape(lambda: _weight(0, inputs, outputs, dtype, scheme))
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    work = Work(weight_bytes + tokens * (inputs + outputs) * jnp.dtype(dtype).itemsize, 2 * tokens * inputs * outputs)
    calls = chain_length(work.bytes)
    make = jax.jit(_weight, static_argnums=(0, 1, 2, 3, 4))
    weights = [make(seed, inputs, outputs, dtype, scheme) for seed in range(calls)]
    x = noise(100, (tokens, inputs), jnp.dtype(dtype))

    def product(backend: Backend, x: Any, weight: Any) -> Any:
        return x @ weight if scheme is None else quant.quant_matmul(x, weight, backend=backend)

    def chain(backend: Backend, x: Any, data: Any) -> Any:
        multiplied = jax.jit(lambda x, weight: product(backend, x, weight))
        for weight in data[1]:
            x = tied(x, multiplied(x, weight))
        return x

    def truth(data: Any) -> Any:
        x, weights = data
        if scheme is None:
            return jnp.dot(x.astype(jnp.float32), weights[0].astype(jnp.float32), precision="highest")
        return product(REFERENCE, x.astype(jnp.float32), weights[0])

    return Problem(
        calls, work, (x, weights), lambda: x, chain, lambda backend, data: product(backend, data[0], data[1][0]), truth
    )


def _weight(seed: int, inputs: int, outputs: int, dtype: str, scheme: str | None) -> Any:
    """A random weight that keeps the size of what it multiplies."""
    weight = noise(seed, (inputs, outputs), jnp.dtype(dtype)) / inputs**0.5
    return weight if scheme is None else quantise(weight, scheme)

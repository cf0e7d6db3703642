"""Thresholds without sorting, for code that can look at all values only through a tally: a pass over memory, say."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

Tally = tuple[Array, Array, Array]  # f32[] amount of what is kept, smallest value kept, largest value not kept


def tally(x: Array, weight: Array, threshold: Array) -> Tally:
    """Elementwise; `merge` those of several blocks and `reduce` the last one."""
    keeps = x >= threshold
    return jnp.where(keeps, weight, 0.0), jnp.where(keeps, x, jnp.inf), jnp.where(keeps, -jnp.inf, x)


def merge(a: Tally, b: Tally) -> Tally:
    return a[0] + b[0], jnp.minimum(a[1], b[1]), jnp.maximum(a[2], b[2])


def reduce(elementwise: Tally) -> Tally:
    return jnp.sum(elementwise[0]), jnp.min(elementwise[1]), jnp.max(elementwise[2])


def settle(tally_at: Callable[[Array], Tally], low: Array, high: Array, amount: Array, wanted: Array) -> Array:
    """f32[] the largest value such that the values from it on amount to `wanted`, a tie at it included.

    low: f32[] keeps `amount`; the answer where that is not even `wanted`. high: f32[] the largest value, always kept.

    Both bounds jump to values that occur, so passes end when none is left between them, or nothing is left to drop.
    Pivots alternate between the place where the amount would be reached if it grew linearly and the middle of the
    float32 bit patterns, which bounds the passes by 64 whatever the values.
    """

    def unsettled(state: Any) -> Array:
        low, high, amount, *_ = state
        return (low < high) & (amount > wanted)

    def narrow(state: Any) -> Any:
        low, high, amount, above, guesses = state
        guess = low + (high - low) * ((amount - wanted) / (amount - above))
        pivot = jnp.where((guesses == 1) & (guess > low) & (guess <= high), guess, middle(low, high))
        kept, smallest, largest = tally_at(pivot)
        enough = kept >= wanted
        return (
            jnp.where(enough, smallest, low),
            jnp.where(enough, high, largest),
            jnp.where(enough, kept, amount),
            jnp.where(enough, above, kept),
            1 - guesses,
        )

    nothing_above, guesses = jnp.float32(0.0), jnp.int32(1)
    return lax.while_loop(unsettled, narrow, (low, high, amount, nothing_above, guesses))[0]


def middle(low: Array, high: Array) -> Array:
    """The float32 halfway between low and high > low in the order of bit patterns, rounded up: above low."""
    a, b = _ordered(lax.bitcast_convert_type(low, jnp.int32)), _ordered(lax.bitcast_convert_type(high, jnp.int32))
    return lax.bitcast_convert_type(_ordered((a | b) - ((a ^ b) >> 1)), jnp.float32)  # a sum would overflow


def _ordered(bits: Array) -> Array:
    """Sign-magnitude to two's complement and back."""
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))

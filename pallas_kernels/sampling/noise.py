"""The noise of a draw: a function of (seed, position, token), the same on every device, backend, batch and setting.

Threefry-2x32 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") and a standard Gumbel variable made of
its bits, in elementwise operations that compile in a kernel as they do in plain JAX. The values are those of

    jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), (V,))

under JAX's default settings; spelt out, they do not change when a process sets others.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA  # of the key schedule, from Threefish
TINIEST = float(np.finfo(np.float32).tiny)  # stands for a uniform 0, of which there is no logarithm
SMALLEST, LARGEST = -math.log(-math.log(TINIEST)), -math.log(-math.log1p(-(2.0**-23)))  # about -4.5 and 15.9

Words = tuple[Array, Array]  # u32 high, u32 low


def draw_key(seed: Array, position: Array) -> Words:
    """The key of one draw; seed u32, position i32, of any one shape."""
    zero = jnp.zeros_like(seed)
    return threefry((zero, seed), (zero, position.astype(jnp.uint32)))


def gumbel(key: Words, token: Array) -> Array:
    """f32 standard Gumbel noise of token i32 under a key that broadcasts against it."""
    high, low = threefry(key, (jnp.zeros_like(token, dtype=jnp.uint32), token.astype(jnp.uint32)))
    mantissa = (high ^ low) >> jnp.uint32(9)
    uniform = lax.bitcast_convert_type(mantissa | jnp.uint32(0x3F800000), jnp.float32) - 1.0  # a multiple of 2^-23
    return -jnp.log(-jnp.log(jnp.maximum(uniform, TINIEST)))


def threefry(key: Words, counter: Words) -> Words:
    """20 rounds of the cipher over two words."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y

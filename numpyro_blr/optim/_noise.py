"""Standard normal noise for many weights, from a hash of their numbers.

The host's generator, threefry with 20 rounds, is a tenth of a step of a small network. Here number i of a key
(k₁, k₂, ...) is xxHash32 of the words (k₁, k₂, ..., i), in a third of the time, and

    ε = √2 erf⁻¹(u),        u = j / 2²⁴, the hash's upper bits as an odd j, −2²⁴ < j < 2²⁴

so that ε and −ε are as likely as each other. The keys are hashes of the host's.

Source: Collet, xxHash (32 bits); Jarzynski & Olano 2020, "Hash Functions for GPU Rendering", on hashes of a counter as
generators of random numbers; Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

__all__ = ["bits", "digest_of", "hashed", "materialised_normals", "normals"]

PRIMES = [np.uint32(prime) for prime in (2654435761, 2246822519, 3266489917, 668265263, 374761393)]


def materialised_normals(rng_key: Array, size: int, zero: Array) -> Array:
    """ε, [size], put into zeros by a loop: of an expression, XLA works each number out again wherever it is used.

    In two halves, since a loop of one round is none to XLA.
    """
    half = -(-size // 2)

    def fill(number: int, noise: Array) -> Array:
        chunk = normals(random.fold_in(rng_key, number), half, zero.dtype)
        return jax.lax.dynamic_update_slice(noise, chunk, (number * half,))

    return jax.lax.fori_loop(0, 2, fill, jnp.broadcast_to(zero, (2 * half,)))[:size]


def normals(rng_key: Array, size: int, dtype: jnp.dtype) -> Array:
    """ε, [size], of 24 random bits each, and of 53 in double precision."""
    upper = bits(rng_key, size)
    if jnp.dtype(dtype) == jnp.float64:
        lower = bits(random.fold_in(rng_key, 0), size)
        words, width = upper.astype(jnp.uint64) << 32 | lower.astype(jnp.uint64), 53
        odd = jax.lax.bitcast_convert_type(words, jnp.int64) >> 10 | 1
    else:
        odd, width = jax.lax.bitcast_convert_type(upper, jnp.int32) >> 7 | 1, 24
    uniform = odd.astype(jnp.float64 if width == 53 else jnp.float32) * 2.0**-width
    return (math.sqrt(2) * jax.lax.erf_inv(uniform)).astype(dtype)


def bits(rng_key: Array, size: int) -> Array:
    """xxHash32 of the words of the key and of each number below `size`, as uint32."""
    return hashed([*words_of(rng_key), jax.lax.iota(jnp.uint32, size)])


def digest_of(arrays: Iterable[Array]) -> Array:
    """A number that two lists of arrays hardly share unless they are the same, bit for bit, in the same order."""
    digest = jnp.zeros((), jnp.uint32)
    for array in arrays:
        words = words_of(array)
        digest = hashed([digest, hashed([words, jax.lax.iota(jnp.uint32, len(words))]).sum(dtype=jnp.uint32)])
    return digest


def words_of(array: Array) -> Array:
    """The bits of an array or of a key, as uint32, [N]."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = random.key_data(array)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32).ravel()


def hashed(words: Sequence[Array]) -> Array:
    """xxHash32 of the words, as uint32; of each element where they are arrays."""
    _, second, third, fourth, fifth = PRIMES
    value = jnp.asarray(fifth + np.uint32(4 * len(words)))
    for word in words:
        value = _rotated(value + word * third, 17) * fourth
    value = (value ^ value >> 15) * second
    value = (value ^ value >> 13) * third
    return value ^ value >> 16


def _rotated(value: Array, by: int) -> Array:
    return value << by | value >> 32 - by

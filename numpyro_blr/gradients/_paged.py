"""Functions of an array's rows, page by page, where only the first rows are there yet: empty room costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["paged"]

PAGE, NUMBERS = 32, 2**18  # rows of a page; fewer where they are long, since a page is to stay in the cache of a core


def paged(function: Callable[..., tuple[Any, Any]], count: Array, *stacks: Array) -> tuple[Any, Any]:
    """Of `function(*pages)`, which gives terms and rows [P, ...]: the terms added up, and the rows in their places.

    Rows of a page of which none is there are zero.

    Args:
        count: of the rows that are there, the first ones. What follows them on the last page is handed over as it is.
        stacks: arrays [K, ...]. A page is a divisor of K: 32 rows where K is a multiple of that.
    """
    capacity, longest = len(stacks[0]), max(math.prod(stack.shape[1:]) for stack in stacks)
    size = math.gcd(capacity, PAGE, 2 ** int(math.log2(max(1, NUMBERS // longest))))

    def turn(number: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def put(stack: Array, page: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(stack, page, number * size, 0)

        sums, rows = carry
        terms, page = function(*(lax.dynamic_slice_in_dim(stack, number * size, size) for stack in stacks))
        return jax.tree.map(jnp.add, sums, terms), jax.tree.map(put, rows, page)

    terms, page = jax.eval_shape(function, *(jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype) for s in stacks))
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), terms)
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), page)
    return lax.fori_loop(0, -(-count // size), turn, (sums, rows))

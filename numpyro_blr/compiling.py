"""How long XLA is to take over a program that runs but a few times.

A step is some hundred small loops. XLA's newer code generator, which sets up a compiler of its own for each of them,
takes longer than all that the steps of a fit do; what its loops gain over the older one's on a CPU is far less.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

__all__ = ["quick"]

MAX_UNOPTIMIZED = 2**14  # numbers in the arguments up to which optimizing takes longer than the steps


def quick(*arguments: Any) -> dict[str, Any]:
    """`compiler_options` of `jax.jit` for a program of some hundred steps of a model with these arguments."""
    options: dict[str, Any] = {}
    if jax.default_backend() == "cpu":
        options["xla_cpu_use_fusion_emitters"] = False
    if sum(np.size(leaf) for leaf in jax.tree.leaves(arguments)) <= MAX_UNOPTIMIZED:
        options["xla_backend_optimization_level"] = 0
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Whether this version of XLA has the option, which it refuses otherwise."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

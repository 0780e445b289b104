"""A parameter of a guide that is a point λ of an exponential family.

    numpyro.sample("rate", natural_param("rate_natural", dist.Gamma(1.0, 1.0)))

In NumPyro the parameter is the family's dataclass itself: `svi.get_params(state)["rate_natural"]` adds and subtracts.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro

from ..families import Natural, natural_of

__all__ = ["natural_param"]


def natural_param(name: str, distribution: Any) -> Any:
    """The distribution whose natural parameters λ are the SVI parameter `name`, started at `distribution`.

    Args:
        distribution: a host's distribution of a registered family, over all rows of the plates around it, or its
            natural parameters. Within a subsampled plate the rows of the batch come back.

    Raises:
        TypeError: the distribution belongs to no registered family.
    """
    natural = distribution if isinstance(distribution, Natural) else natural_of(distribution)
    natural = numpyro.param(name, type(natural)(*(jnp.asarray(leaf) for leaf in vars(natural).values())))
    leaves = zip(vars(natural).values(), natural.ranks, strict=True)
    rows = type(natural)(*(numpyro.subsample(leaf, event_dim=rank) for leaf, rank in leaves))
    return rows.to_distribution()

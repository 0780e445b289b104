"""A parameter of a guide that is a point λ of an exponential family.

    numpyro.sample("rate", natural_param("rate_natural", dist.Gamma(1.0, 1.0)))

In NumPyro the parameter is the family's dataclass itself: `svi.get_params(state)["rate_natural"]` adds and subtracts.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from ..families import Natural, natural_of
from ..optim._layout import EVENT_DIM

__all__ = ["natural_param"]


def natural_param(name: str, distribution: Any, *, event_dim: int = 0) -> Any:
    """The distribution whose natural parameters λ are the SVI parameter `name`, started at `distribution`.

    Fit it with `BLR`, which knows the family's domain; a step of another optimizer can leave it.

    Args:
        distribution: a host's distribution of a registered family, over all rows of the plates around it, or its
            natural parameters. Within a subsampled plate the rows of the batch come back.
        event_dim: how many axes of its batch, from the right, are the site's event, as in `to_event`; those of a
            distribution under `to_event` are counted anyway, and `expand` is heeded.

    Raises:
        TypeError: the distribution belongs to no registered family.
    """
    base, num_axes = distribution, 0
    while isinstance(base, (dist.Independent, dist.ExpandedDistribution)):
        num_axes += getattr(base, "reinterpreted_batch_ndims", 0)
        base = base.base_dist
    natural = base if isinstance(base, Natural) else natural_of(base)
    batch_shape = natural.batch_shape
    if base is not distribution:
        batch_shape = distribution.batch_shape + distribution.event_shape[:num_axes]
    event_dim += num_axes
    leaves = zip(vars(natural).values(), natural.ranks, strict=True)
    each = (jnp.broadcast_to(leaf, batch_shape + leaf.shape[leaf.ndim - rank :]) for leaf, rank in leaves)
    start = type(natural)(*each)
    natural = numpyro.param(name, start, **{EVENT_DIM: event_dim})
    leaves = zip(vars(natural).values(), natural.ranks, strict=True)
    rows = type(natural)(*(numpyro.subsample(leaf, event_dim=rank + event_dim) for leaf, rank in leaves))
    return rows.to_distribution().to_event(event_dim)

"""A parameter of a guide that is a point λ of an exponential family.

    pyro.sample("rate", natural_param("rate_natural", dist.Gamma(1.0, 1.0)))

In Pyro, whose parameter store holds tensors, each field of λ is a parameter of its own, `"rate_natural.log"` and
`"rate_natural.linear"` here. The tensor has an attribute `natural_field`, the family and the field's name.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pyro
import torch

from ..families import Natural, natural_of

__all__ = ["natural_param"]


def natural_param(name: str, distribution: Any, *, event_dim: int = 0) -> Any:
    """The distribution whose natural parameters λ are the parameters `name` + "." + field, started at `distribution`.

    Fit it with `BLR`, which knows the family's domain; a step of another optimizer can leave it.

    Args:
        distribution: a host's distribution of a registered family, over all rows of the plates around it, or its
            natural parameters. Within a subsampled plate the rows of the batch come back.
        event_dim: how many axes of its batch, from the right, are the site's event, as in `to_event`; those of a
            distribution under `to_event` are counted anyway.

    Raises:
        TypeError: the distribution belongs to no registered family.
    """
    if isinstance(distribution, torch.distributions.Independent):
        event_dim += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    natural = distribution if isinstance(distribution, Natural) else natural_of(distribution)
    rows = []
    for item, rank in zip(fields(natural), natural.ranks, strict=True):  # type: ignore[arg-type]
        start = getattr(natural, item.name).detach().clone()  # the parameter is not to be the caller's tensor
        value: Any = pyro.param(f"{name}.{item.name}", start, event_dim=rank + event_dim)
        if hasattr(value, "_pyro_unconstrained_param") or hasattr(value, "unconstrained"):
            # set at every run of the guide, so also on parameters that came from a file
            tensor = getattr(value, "_pyro_unconstrained_param", None)
            (value.unconstrained() if tensor is None else tensor).natural_field = (type(natural), item.name)
        rows.append(value)
    return type(natural)(*rows).to_distribution().to_event(event_dim)

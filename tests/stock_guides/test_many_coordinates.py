"""Where a dense Hessian is too large: a mean-field guide over more than 256 coordinates, with defaults."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

GROUPS = 300


def groups_of_counts(host):
    """302 coordinates, of which two are in every other's term: groups with the same count have the same posterior."""

    def model(counts):
        center = host.sample("center", host.dist.Normal(0.0, 2.0))
        spread = host.sample("spread", host.dist.HalfNormal(1.0))
        with host.plate("groups", GROUPS):
            offset = host.sample("offset", host.dist.Normal(0.0, 1.0))
            host.sample("counts", host.dist.Poisson(host.xp.exp(center + spread * offset)), obs=counts)

    return model


@pytest.mark.slow_to_compile
def test_groups_with_the_same_data_agree_after_forty_steps(backend):
    """One probe for all coordinates leaves their log scales 0.05 apart, and a step that is judged by D new scales at a
    few draws is refused for ever.
    """
    counts = np.minimum(np.random.default_rng(0).poisson(np.exp(np.random.default_rng(1).normal(0.5, 0.7, GROUPS))), 5)
    mean_field = lambda host, model: host.autoguide.AutoNormal(model)  # noqa: E731
    fit = backend.start(groups_of_counts, mean_field, (counts.astype(float),)).run(40)
    loc, scale = (fit.params[name] for name in fit.param_names("offset"))
    same = [counts == count for count in range(6)]
    assert min(group.sum() for group in same) > 10
    for group in same:
        assert np.log(scale[group]).std() < 0.02
        assert (loc[group] / scale[group]).std() < 0.08
    means = np.array([loc[group].mean() for group in same])
    assert (np.diff(means) > 0.2).all(), "the more, the higher"
    assert_allclose(means @ [group.sum() for group in same] / GROUPS, 0, atol=0.1)  # of the offsets about the center

"""`BLR()` as it comes, on a real posterior with trusted moments: POSTERIORDB names the folder of the reference draws.

Skipped where it is not set: the data are not part of this project.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = os.environ.get("POSTERIORDB")


@pytest.mark.skipif(FOLDER is None, reason="POSTERIORDB does not name a folder of reference posteriors")
def test_full_rank_has_the_moments_of_a_nearly_gaussian_posterior(backend):
    """Test scores of children, regressed on uncentred, unscaled predictors: 50 steps, defaults, the default start."""
    record = json.loads((Path(FOLDER) / "kidiq_momhsiq.json").read_text())
    data, draws = record["data"], {name: np.asarray(values) for name, values in record["draws"].items()}
    inputs = np.column_stack([np.ones(data["N"]), data["mom_hs"], data["mom_iq"]]).astype(float)
    scores = np.asarray(data["kid_score"], float)

    def make_model(host):
        def model(inputs, scores):
            beta = host.sample("beta", host.dist.Normal(host.array(np.zeros(3)), 1e4).to_event(1))  # as good as flat
            sigma = host.sample("sigma", host.dist.HalfCauchy(host.array(2.5)))
            with host.plate("children", len(scores)):
                host.sample("score", host.dist.Normal(inputs @ beta, sigma), obs=scores)

        return model

    fit = backend.start(make_model, lambda host, model: host.autoguide.AutoMultivariateNormal(model), (inputs, scores))
    posterior = fit.run(50).posterior()
    mean, scale = (backend.to_numpy(value) for value in (posterior.mean, posterior.variance**0.5))
    unconstrained = np.column_stack([draws["beta"], np.log(draws["sigma"])])
    expected_mean, expected_scale = unconstrained.mean(0), unconstrained.std(0)
    # 500 reference draws: five standard errors of a mean, 5 / √500 sd, and of a log standard deviation, 5 / √1000
    assert (np.abs(mean - expected_mean) < 5 / 500**0.5 * expected_scale).all()
    assert (np.abs(np.log(scale / expected_scale)) < 5 / 1000**0.5).all()

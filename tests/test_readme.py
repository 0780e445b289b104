"""The README's programs run as they stand, and land on the posteriors that they say they do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import numpy as np
design, response = np.asarray(x, float), np.asarray(y, float)
precision = design.T @ design / 0.5**2 + np.eye(2) / 10**2
exact = np.linalg.solve(precision, design.T @ response / 0.5**2)
np.testing.assert_allclose(guide.get_posterior(result.params).loc, exact, rtol=1e-3)  # float32
"""


CONJUGATE = """
posterior = guide.posterior(result.params)["rate"]
np.testing.assert_allclose([posterior.concentration, posterior.rate], [19, 4.5], rtol=1e-5)  # float32
"""
REGISTERED = """
import jax
import numpy as np
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro_blr import BLR, AutoExponentialFamily

def model():
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    numpyro.factor("more", -3 * scale**2)

guide = AutoExponentialFamily(model)
result = SVI(model, guide, BLR(), Trace_ELBO()).run(jax.random.key(0), 1, progress_bar=False)
np.testing.assert_allclose(guide.natural(result.params)["scale"].quadratic, -1 / 8 - 3, rtol=1e-5)
"""


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_a_conjugate_model_is_solved_in_one_step():
    pytest.importorskip("numpyro")
    (program,) = (program for program in programs() if "dist.Poisson" in program)
    run(program + "\nimport numpy as np\n" + CONJUGATE)


def test_a_family_of_ones_own_is_used_by_the_guide_and_found_conjugate():
    pytest.importorskip("numpyro")
    (program,) = (program for program in programs() if "@family" in program)
    run(program + REGISTERED)


def test_the_quickstart_is_the_exact_posterior_and_fit_ends_by_itself():
    """One program: what `fit` is shown with are the model and the data of the quickstart."""
    pytest.importorskip("numpyro")
    quickstart = programs()[0]
    assert "BLR()" in quickstart
    (program,) = (program for program in programs() if "import fit" in program)
    run(quickstart + CHECK + program + "\nassert result.converged and result.steps < 50, result.report()\n")


def test_a_network_learns_its_weights_distribution():
    pytest.importorskip("pyro")
    (program,) = (program for program in programs() if "BayesianModule(" in program)
    run(program + "\nerror = (prediction.squeeze(-1) - y).abs().mean()\nassert error < 0.3 * y.abs().mean(), error\n")

"""The README's first program runs as it stands, and lands on the posterior that it says it does."""

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


def test_the_quickstart_is_the_exact_posterior():
    pytest.importorskip("numpyro")
    program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    assert "BLR()" in program
    subprocess.run([sys.executable, "-c", program + CHECK], cwd=ROOT, check=True, capture_output=True, timeout=120)

"""Every example runs, and asserts its answer where that is known."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FRAMEWORKS = {"numpyro": ("jax", "numpyro"), "pyro": ("torch", "pyro")}
# one pair and the demo are enough at every run; the others are run with `-m slow`
QUICK = ("counts",)
ARGUMENTS = {"streaming": ("--refits", "2")}
SCRIPTS = [
    pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in sorted(EXAMPLES.glob("*/[!_]*.py"))
]


def need(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")


def run(script: Path, *arguments: str, folder: Path) -> str:
    """The output of a script that is run as its reader would, in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_and_finds_its_answer(script, tmp_path):
    need("matplotlib", "rich", "statsmodels", "sklearn", *FRAMEWORKS[script.parent.name])
    assert run(script, *ARGUMENTS.get(script.stem, ()), folder=tmp_path).strip(), "it says what it found"


@pytest.mark.parametrize("host", FRAMEWORKS)
def test_the_demo_runs_and_draws(host, tmp_path):
    need("matplotlib", "rich", "statsmodels", *FRAMEWORKS[host])
    output = run(EXAMPLES / "demo.py", "--tiny", "--host", host, "--figure", "figure.png", folder=tmp_path)
    assert "BLR" in output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_examples_come_in_pairs():
    names = [sorted(path.name for path in (EXAMPLES / host).glob("*.py")) for host in FRAMEWORKS]
    assert names[0] == names[1]

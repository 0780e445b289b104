"""Fixtures of the shared tests. Every test runs on each framework that is installed, with the strict modes on."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded: the problems are small, the workers several

import functools
import importlib.util
from importlib.metadata import version
from pathlib import Path

if importlib.util.find_spec("jaxlib"):
    # Most of the time of a test goes into compiling a program that runs a few times, which takes half as long without
    # XLA's newer code generators. XLA refuses flags that it does not know: versions other than the pinned go without.
    # With the last one, batched linear algebra that is run at once does not wait for itself, as in jaxlib 0.10 it may.
    pinned = (Path(__file__).parent.parent / "constraints.txt").read_text().split()
    if f"jaxlib=={version('jaxlib')}" in pinned:
        quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        in_turn = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ.setdefault("XLA_FLAGS", f"{quick} {in_turn}")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # those of whatever it compiles

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from .backends import BRIDGES, Bridge

FRAMEWORKS = {"numpyro": ("jax", "numpyro"), "pyro": ("torch", "pyro")}

# The same examples at every run; the first example compiles, and the bridge holds no state that an example changes.
settings.register_profile(
    "tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        in_numpyro = getattr(item, "callspec", None) is not None and item.callspec.params.get("backend") == "numpyro"
        if in_numpyro and item.get_closest_marker("slow_to_compile"):
            item.add_marker("slow")


@functools.cache
def bridge(name: str) -> Bridge:
    """The bridge to a framework; skips the test where the framework is not installed."""
    missing = [module for module in FRAMEWORKS[name] if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    return BRIDGES[name]()


@pytest.fixture(params=list(BRIDGES))
def backend(request: pytest.FixtureRequest) -> Bridge:
    made = bridge(request.param)
    made.reset(seed=0)
    return made


@pytest.fixture
def both() -> tuple[Bridge, Bridge]:
    """(NumPyro's bridge, Pyro's) for tests of their agreement."""
    bridges = tuple(bridge(name) for name in BRIDGES)
    for made in bridges:
        made.reset(seed=0)
    return bridges


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def numpyro_bridge() -> Bridge:
    return bridge("numpyro")


@pytest.fixture
def pyro_bridge() -> Bridge:
    made = bridge("pyro")
    made.reset(seed=0)
    return made

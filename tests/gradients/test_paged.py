"""Arrays of which the first rows are there: what is found is that of these rows, wherever a page ends."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.cases import Part

jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
paged = pytest.importorskip("numpyro_blr.gradients._paged", reason="NumPyro is not installed")
recycled = pytest.importorskip("numpyro_blr.gradients.recycled", reason="NumPyro is not installed")
pytestmark = pytest.mark.usefixtures("numpyro_bridge")


@pytest.mark.parametrize("capacity", [96, 40, 7], ids=["pages of 32", "of 8", "of 1"])
@pytest.mark.parametrize("share", [0, 0.1, 0.6, 1])
def test_the_terms_are_of_the_pages_with_rows_and_the_rows_in_their_places(random, capacity, share):
    count = round(share * capacity)
    size = np.gcd(capacity, paged.PAGE)
    weights, vectors = random.normal(size=capacity), random.normal(size=(capacity, 3))
    calls = []

    def products(weights, vectors):
        calls.append(len(weights))
        return {"sum": weights @ vectors}, (weights[:, None] * vectors, weights**2)

    terms, rows = paged.paged(products, jnp.asarray(count), jnp.asarray(weights), jnp.asarray(vectors))
    there = np.arange(capacity) < -(-count // size) * size
    assert set(calls) == {size}
    assert_allclose(terms["sum"], weights[there] @ vectors[there], atol=1e-14)
    assert_allclose(rows[0], there[:, None] * weights[:, None] * vectors)
    assert_allclose(rows[1], there * weights**2)


def test_a_page_of_long_rows_has_fewer_of_them():
    rows = jnp.zeros((64, paged.NUMBERS // 8))
    calls = []
    paged.paged(lambda rows: (calls.append(len(rows)), ()), jnp.asarray(3), rows)
    assert set(calls) == {8}


def test_the_first_pairs_of_some_that_are_not_all_there(numpyro_bridge, random):
    """As those alone, whatever stands in the rows behind them; the next ones take their places and their numbers."""
    blocks = numpyro_bridge.blocks((Part(0, (2,), "dense"),))
    loc, scales = jnp.zeros(2), (jnp.eye(2),)
    noise, values, gradients, hessians = (
        jnp.asarray(random.normal(size=shape)) for shape in ((4, 2, 2), (4, 2), (4, 2, 2), (4, 2, 2, 2))
    )
    some = recycled.init(16, loc, scales)
    alone = some
    for number in (1, 3, 4):
        found = noise + number, values + number, gradients + number, hessians + number
        some = recycled.append(some, blocks, loc, scales, *found, number=jnp.asarray(number))
        alone = recycled.append(alone, blocks, loc, scales, *(array[:number] for array in found))
    assert int(some.count) == int(alone.count) == 8
    assert_array_equal(some.numbers[:8], np.arange(8))
    assert_array_equal(alone.numbers[:8], np.arange(8))
    for name in ("points", "values", "gradients", "hessians", "log_mixture", "locs", "whiteners"):
        assert_allclose(getattr(some, name)[:8], getattr(alone, name)[:8], rtol=1e-13, err_msg=name)
    one, other = (recycled.moments(pool, blocks, loc + 0.1, scales) for pool in (some, alone))
    for name, value in one._asdict().items():
        assert_allclose(value, getattr(other, name), rtol=1e-11, atol=1e-11, err_msg=name)

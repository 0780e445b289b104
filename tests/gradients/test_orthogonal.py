"""Draws at right angles: each a standard normal, and D of them hardly noisy on a quadratic."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

SIZE = 5
MATRIX = np.random.default_rng(1).normal(size=(SIZE, SIZE))
FREE = MATRIX + MATRIX.T - 2 * np.trace(MATRIX) / SIZE * np.eye(SIZE)  # its trace is zero


@pytest.fixture
def orthogonal(backend):
    return backend.module("gradients.orthogonal")


def frames(backend, orthogonal, num_frames: int) -> np.ndarray:
    normals = np.random.default_rng(0).normal(size=(2 * num_frames * SIZE, SIZE))
    return backend.to_numpy(orthogonal.orthogonal(backend.array(normals))).reshape(num_frames, SIZE, SIZE)


def test_the_draws_of_a_frame_are_at_right_angles_and_as_long_as_independent_ones(backend, orthogonal):
    normals = np.random.default_rng(0).normal(size=(2 * 3 * SIZE, SIZE))
    rows = backend.to_numpy(orthogonal.orthogonal(backend.array(normals))).reshape(3, SIZE, SIZE)
    squares = (normals[3 * SIZE :] ** 2).sum(1).reshape(3, SIZE)
    assert_allclose(rows @ rows.swapaxes(1, 2), squares[..., None] * np.eye(SIZE), atol=1e-12)


def test_each_draw_of_an_antithetic_pair_is_a_standard_normal(backend, orthogonal):
    """E ε_a² = 1, E ε_a⁴ = 3 and E ε_a² ε_b² = 1, of the first row and of the last, within five standard errors."""
    rows = frames(backend, orthogonal, 20_000)
    for row in (rows[:, 0], rows[:, -1]):
        squares = row**2
        for moment, expected in ((squares, 1), (squares**2, 3), (squares[:, 0] * squares[:, 1], 1)):
            error = moment.std(0) / len(row) ** 0.5
            assert (np.abs(moment.mean(0) - expected) < 5 * error).all()
        assert_allclose(np.einsum("na,nb->ab", row, row) / len(row), np.eye(SIZE), atol=0.06)


@pytest.mark.parametrize("matrix", [FREE, np.eye(SIZE)], ids=["trace zero", "identity"])
def test_the_variance_of_a_quadratic_is_what_the_equation_says(backend, orthogonal, matrix):
    rows = frames(backend, orthogonal, 20_000)
    means = np.einsum("nka,ab,nkb->n", rows, matrix, rows) / SIZE
    expected = 2 / SIZE * (2 * (matrix**2).sum() + np.trace(matrix) ** 2) / (SIZE + 2)
    assert_allclose(means.var(), expected, rtol=0.05)


def test_no_row_is_left_out_or_drawn_twice(backend, orthogonal):
    """Steps of one, two and four pairs over room for two frames: the stream of rows is that of whole frames."""
    frame = orthogonal.init(backend.array(np.zeros(SIZE)), 8)
    num_rows, stream, seen = len(frame.rows), [], []
    for step, number in enumerate((1, 2, 4, 4, 1, 8, 8, 3)):
        normals = backend.array(np.random.default_rng(step).normal(size=(2 * num_rows, SIZE)))
        if int(frame.used) + number > num_rows:
            stream.append(backend.to_numpy(orthogonal.orthogonal(normals)))
        noise, frame = orthogonal.drawn(frame, lambda _, normals=normals: normals, number, 8)
        assert noise.shape == (8, SIZE)
        seen.append(backend.to_numpy(noise)[:number])
    seen = np.concatenate(seen)
    assert_allclose(np.concatenate(stream)[: len(seen)], seen, rtol=1e-12)
    assert len(stream) * num_rows - len(seen) < num_rows, "no more than are asked for"

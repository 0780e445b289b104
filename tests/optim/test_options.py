"""What may be passed to a rule: a wrong argument is refused at once, saying what was expected and what came."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

REFUSED = {
    "rate zero": ({"learning_rate": 0.0}, ValueError, r"\(0, 1\]", "0.0"),
    "rate too long": ({"learning_rate": 1.5}, ValueError, r"\(0, 1\]", "1.5"),
    "rate negative": ({"learning_rate": -0.1}, ValueError, r"\(0, 1\]", "-0.1"),
    "rate not a number": ({"learning_rate": math.nan}, ValueError, r"\(0, 1\]", "nan"),
    "rate a string": ({"learning_rate": "0.1"}, TypeError, "number", "'0.1'"),
    "rate a boolean": ({"learning_rate": True}, TypeError, "number", "True"),
    "rate complex": ({"learning_rate": 1j}, TypeError, "number", "1j"),
    "schedule too long": ({"learning_rate": lambda count: 2.0}, ValueError, r"\(0, 1\]", "2.0 at step 0"),
    "schedule to zero": ({"learning_rate": lambda count: 1 - count / 8}, ValueError, r"\(0, 1\]", "0.0 at step 8"),
    "schedule late": ({"learning_rate": lambda count: 1.0 if count < 1e6 else 3.0}, ValueError, r"\(0, 1\]", "3.0"),
    "estimator unknown": ({"estimator": "newton"}, ValueError, "'hutchinson'", "'newton'"),
    "estimator none": ({"estimator": None}, ValueError, "'hutchinson'", "None"),
    "gradient without a rate": ({"estimator": "gradient"}, ValueError, "learning_rate", "'gradient'"),
    "draws odd": ({"num_draws": 7}, ValueError, "even", "7"),
    "draws too few": ({"num_draws": 2}, ValueError, "at least 4", "2"),
    "draws negative": ({"num_draws": -8}, ValueError, "at least 4", "-8"),
    "draws not whole": ({"num_draws": 8.0}, TypeError, "integer", "8.0"),
    "draws a boolean": ({"num_draws": True}, TypeError, "integer", "True"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "positive", "0.0"),
    "temperature infinite": ({"temperature": math.inf}, ValueError, "finite", "inf"),
    "temperature not a number": ({"temperature": math.nan}, ValueError, "positive", "nan"),
    "temperature a string": ({"temperature": "hot"}, TypeError, "positive number", "'hot'"),
    "others a name": ({"others": "adam"}, TypeError, "optim", "'adam'"),
    "others a function": ({"others": abs}, TypeError, "optim", "abs"),
}
ACCEPTED = {
    "nothing": {},
    "full step": {"learning_rate": 1},
    "numpy's number": {"learning_rate": np.float64(0.5)},
    "schedule": {"learning_rate": lambda count: (1 + count) ** -0.6},
    "gradient with a rate": {"estimator": "gradient", "learning_rate": 0.01},
    "four draws": {"num_draws": 4, "temperature": 2, "estimator": "hutchinson"},
}


@pytest.mark.parametrize(("arguments", "error", "expected", "received"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused_where_they_are_passed(backend, arguments, error, expected, received):
    with pytest.raises(error) as caught:
        backend.BLR(**arguments)
    message = str(caught.value)
    assert re.search(expected, message), "the message says what was expected"
    assert received in message, "the message says what came"


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_right_arguments_are_taken(backend, arguments):
    optimizer = backend.BLR(**arguments)
    for name in {"learning_rate", "estimator", "num_draws", "temperature"} & set(arguments):
        assert getattr(optimizer, name) == arguments[name]


def test_only_the_rate_is_positional(backend):
    assert backend.BLR(0.5).learning_rate == 0.5
    with pytest.raises(TypeError, match="positional"):
        backend.BLR(0.5, "hessian")


IVON_REFUSED = {
    "rate zero": ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive", "0.0"),
    "rate negative": ({"learning_rate": -0.1}, ValueError, "learning_rate must be positive", "-0.1"),
    "rate infinite": ({"learning_rate": math.inf}, ValueError, "learning_rate.*finite", "inf"),
    "rate not a number": ({"learning_rate": math.nan}, ValueError, "learning_rate.*positive", "nan"),
    "rate a string": ({"learning_rate": "0.1"}, TypeError, "learning_rate.*number", "'0.1'"),
    "schedule negative": (
        {"learning_rate": lambda count: 1 - count / 8},
        ValueError,
        "learning_rate",
        "-1.0 at step 16",
    ),
    "schedule not a number": ({"learning_rate": lambda count: math.nan}, ValueError, "learning_rate", "nan at step 0"),
    "preconditioner unknown": ({"preconditioner": "adam"}, ValueError, "'factored', 'posterior'", "'adam'"),
    "beta1 one": ({"beta1": 1.0}, ValueError, r"beta1.*\[0, 1\)", "1.0"),
    "beta2 negative": ({"beta2": -0.1}, ValueError, r"beta2.*\[0, 1\)", "-0.1"),
    "beta3 two": ({"beta3": 2}, ValueError, r"beta3.*\[0, 1\)", "2"),
    "beta3 a boolean": ({"beta3": True}, TypeError, "beta3.*number", "True"),
    "curvature zero": ({"hess_init": 0.0}, ValueError, "hess_init must be positive", "0.0"),
    "curvature infinite": ({"hess_init": math.inf}, ValueError, "hess_init.*finite", "inf"),
    "clip zero": ({"clip_radius": 0.0}, ValueError, "clip_radius must be positive", "0.0"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature must be positive", "0.0"),
    "temperature a string": ({"temperature": "hot"}, TypeError, "temperature.*number", "'hot'"),
    "accumulation zero": ({"accumulation_steps": 0}, ValueError, "accumulation_steps.*at least 1", "0"),
    "accumulation not whole": ({"accumulation_steps": 2.0}, TypeError, "accumulation_steps.*integer", "2.0"),
    "others a name": ({"others": "adam"}, TypeError, "optim", "'adam'"),
}
IVON_ACCEPTED = {
    "nothing": {},
    "published": {"preconditioner": "posterior", "learning_rate": 0.2, "beta2": 0.99999, "clip_radius": 1e-3},
    "schedules": {"learning_rate": lambda count: 1 / (1 + count), "temperature": lambda count: 1.0},
    "a schedule that ends": {"learning_rate": lambda count: max(0.0, 1 - count / 8)},
    "no memory": {"beta1": 0.0, "beta2": 0, "beta3": 0.0},
    "no clip": {"clip_radius": math.inf},
}


@pytest.mark.parametrize(("arguments", "error", "expected", "received"), IVON_REFUSED.values(), ids=IVON_REFUSED)
def test_wrong_arguments_of_ivon_are_refused_where_they_are_passed(backend, arguments, error, expected, received):
    with pytest.raises(error) as caught:
        backend.IVON(**arguments)
    message = str(caught.value)
    assert re.search(expected, message), "the message says what was expected"
    assert received in message, "the message says what came"


@pytest.mark.parametrize("arguments", IVON_ACCEPTED.values(), ids=IVON_ACCEPTED)
def test_right_arguments_of_ivon_are_taken(backend, arguments):
    optimizer = backend.IVON(**arguments)
    for name, value in arguments.items():
        assert getattr(optimizer, name) == value


def test_a_schedule_of_the_temperature_must_stay_positive(backend):
    """At τ = 0 the posterior is a point, and the curvature has no estimate."""
    with pytest.raises(ValueError, match=r"temperature.*0\.0 at step 0"):
        backend.IVON(temperature=lambda count: 0.0)

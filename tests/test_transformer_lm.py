"""The transformer of `examples/transformer_lm.py`: resumed runs, reports, the agreement of the hosts, the measures."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from .test_examples import EXAMPLES, FRAMEWORKS, ROOT, need

PACKAGES = {
    "numpyro": ("flax", "optax", "safetensors", "tokenizers", "tqdm", "rich", "matplotlib", *FRAMEWORKS["numpyro"]),
    "pyro": ("safetensors", "tokenizers", "tqdm", "rich", "matplotlib", *FRAMEWORKS["pyro"]),
}
FOREIGN = {"numpyro": "torch", "pyro": "jax"}
REPORTED = {
    "host", "optimizer", "size", "device", "parameters", "steps", "step_seconds_median", "peak_memory_bytes",
    "validation_loss_mean", "validation_loss_averaged", "calibration_error_mean", "calibration_error_averaged",
}  # fmt: skip
TINY = (
    *("--device", "cpu", "--size", "test", "--steps", "6", "--accumulate", "2", "--batch", "4", "--context", "16"),
    *("--limit", "20000", "--evaluation-tokens", "500", "--draws", "2", "--generate", "3"),
)
# runs of one process: what the interpreter and the compiler cost is paid once
SCRIPT = """
import json, sys
import transformer_lm
for sys.argv[1:] in json.loads(sys.argv[1]):
    transformer_lm.main()
assert {foreign!r} not in sys.modules, "one host has imported the other's framework"
"""


def run(host: str, *runs: tuple[str, ...], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(ROOT), *sys.path])}
    environment |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    # the three runs of a case compile the same programs
    environment |= {"JAX_COMPILATION_CACHE_DIR": "compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = json.dumps([["--host", host, *TINY, *options] for options in runs])
    command = [sys.executable, "-c", SCRIPT.format(foreign=FOREIGN[host]), arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr


@dataclass(frozen=True)
class Case:
    host: str
    options: tuple[str, ...]

    @property
    def optimizer(self) -> str:
        return self.options[1]

    @property
    def first_draw_differs(self) -> bool:
        """In Pyro the first step with `IVON` returns the loss at a draw of the stock guide, and only then moves, by
        another draw: what a resumed run first reports is another number.
        """
        return (self.host, self.optimizer) == ("pyro", "ivon")


CHARACTERS = ("--optimizer", "adamw", "--tokens", "character")
BYTE_PAIRS = ("--optimizer", "ivon", "--tokens", "bpe", "--positions", "rotary", "--tie", "--dtype", "bfloat16")
CASES = [
    pytest.param(Case("numpyro", CHARACTERS), id="numpyro-adamw", marks=pytest.mark.slow),
    pytest.param(Case("numpyro", BYTE_PAIRS), id="numpyro-ivon", marks=pytest.mark.slow),  # XLA compiles for a minute
    pytest.param(Case("pyro", CHARACTERS), id="pyro-adamw", marks=pytest.mark.slow),
    pytest.param(Case("pyro", BYTE_PAIRS), id="pyro-ivon"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For a case the folder of three runs: whole, stopped after three steps, and in another process gone on with."""

    @functools.cache
    def made(case: Case) -> Path:
        need(*PACKAGES[case.host])
        folder = tmp_path_factory.mktemp(f"{case.host}-{case.optimizer}")
        stops = (("--stop", "6", "--checkpoint", "whole"), ("--stop", "3", "--checkpoint", "stopped"))
        run(case.host, *((*case.options, *stop) for stop in stops), folder=folder)
        outputs = ("--checkpoint", "resumed", "--json", "report.json", "--figure", "figure.png")
        run(case.host, (*case.options, "--resume", "stopped", *outputs), folder=folder)
        return folder

    return made


def tensors(path: Path) -> dict[str, np.ndarray]:
    return importlib.import_module("safetensors.numpy").load_file(path)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_that_never_stopped(case, results):
    folder = results(case)
    whole, stopped, resumed = (tensors(folder / name) for name in ("whole", "stopped", "resumed"))
    assert len(stopped["losses"]) == 3
    assert whole.keys() == resumed.keys()
    losses, again = whole.pop("losses"), resumed.pop("losses")
    if case.first_draw_differs:
        losses, again = np.delete(losses, 3), np.delete(again, 3)
    assert_array_equal(again, losses)
    for name, value in whole.items():
        assert_array_equal(resumed[name], value, strict=True, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_run_reports_what_it_measured(case, results):
    folder = results(case)
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= REPORTED
    assert (report["host"], report["optimizer"], report["steps"]) == (case.host, case.optimizer, 6)
    assert all(value > 0 for name, value in report.items() if name.startswith(("validation", "step", "peak", "param")))
    draws_differ = report["validation_loss_averaged"] != report["validation_loss_mean"]
    assert draws_differ == (case.optimizer == "ivon")
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_hosts_take_the_same_steps(results):
    """From the same weights on the same batches; float32, so to rounding."""
    numpyro, pyro = (tensors(results(Case(host, CHARACTERS)) / "whole")["losses"] for host in FRAMEWORKS)
    assert_allclose(numpyro, pyro, rtol=1e-5)


@pytest.fixture
def example(monkeypatch):
    """Import a module of the examples by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_the_calibration_error_is_that_of_its_definition(example):
    """Two bins: three tokens at 0.9, two of them right, and one at 0.1, wrong."""
    evaluation = example("_evaluation")
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.1]), np.array([True, True, False, False])
    prediction = evaluation.Prediction(np.log([0.9, 0.9, 0.1, 0.1]), confidence, correct, *np.zeros((2, 4)))
    calibration = evaluation.Calibration.of(prediction)
    assert_allclose(calibration.share, [0.25, 0.75])
    assert_allclose(calibration.error, 0.25 * 0.1 + 0.75 * (0.9 - 2 / 3))
    assert_allclose(prediction.loss, -np.log([0.9, 0.9, 0.1, 0.1]).mean())


def test_targets_are_what_comes_next(example):
    text = example("_text")
    corpus = text.Corpus.of("".join(map(chr, range(100))), "character", 0)
    assert (len(corpus.training), len(corpus.validation)) == (90, 10)
    for inputs, targets in [corpus.batch((2, 3), 4, 0, 0), *text.windows(corpus.training, 3, 4, 89)]:
        assert inputs.shape[-2:] == (3, 4)
        assert_array_equal(targets, inputs + 1)
    with pytest.raises(ValueError, match="too few"):
        next(text.windows(corpus.validation, 3, 16, 500))


@pytest.mark.parametrize("tokens", ["character", "bpe"])
def test_tokens_decode_to_their_text(tokens, example):
    need("tokenizers")
    text = "def f(x):\n    return x  # déjà vu\n" * 20
    tokenizer = example("_text").Corpus.of(text, tokens, 300).tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).max() < tokenizer.vocabulary


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(example):
    need("safetensors")
    transformer = example("_transformer")
    size = transformer.SIZES["test"]
    config = transformer.Config(
        host="", layers=size.layers, heads=size.heads, width=size.width, vocabulary=9, context=8, positions="learned",
        tie=True, optimizer="adamw", learning_rate=0.5, warmup=0.1, steps=100, accumulate=1, batch=1, num_data=1,
        text_digest="", dtype="float32", device="cpu", seed=0,
    )  # fmt: skip
    rates = transformer.schedule(config)(np.arange(101))
    assert_allclose(rates[[0, 9, 10, 100]], [0.05, 0.5, 0.5, 0.05])
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()

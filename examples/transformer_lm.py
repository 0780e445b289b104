"""Train a transformer language model, and ask how far its weights, and its predictions, are to be trusted.

A decoder-only transformer learns to predict the next character, or byte pair, of a text: with AdamW, or with `IVON` in
the host's stock SVI, which from the same gradients learns a Gaussian over the weights. At the end, on text that was
held out: the loss at the mean of the weights and averaged over draws of them; how well calibrated both are; how unsure
they are of this text, and of texts that they should find strange; and a text of their own, shaded where it was unsure.

    python examples/transformer_lm.py --optimizer ivon
    python examples/transformer_lm.py --size base --text FILE --tokens bpe --context 256 --dtype bfloat16 --device cuda

Without `--text` it reads the sources of Python's own library. `--checkpoint` keeps the run as it goes, and `--resume`
goes on with it as if it had never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from _evaluation import Calibration, Prediction, predict
from _generation import show, write
from _text import Corpus, read, windows
from _transformer import SIZES, Config, layout, load, save, schedule
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

HOSTS = {"numpyro": ("jax", "numpyro"), "pyro": ("torch", "pyro")}
LEARNING_RATES = {"adamw": 2e-3, "ivon": 0.05}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--host", choices=HOSTS, help="default: the first that is installed")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--optimizer", choices=LEARNING_RATES, default="ivon")
    add("--seed", type=int, default=0)

    data = parser.add_argument_group("text")
    data.add_argument("--text", type=Path, help="default: the sources of Python's library")
    data.add_argument("--limit", type=int, default=4_000_000, help="characters to read at most")
    data.add_argument("--tokens", choices=["character", "bpe"], default="character")
    data.add_argument("--vocabulary", type=int, help="byte-pair tokens at most; default: by the size")

    network = parser.add_argument_group("network")
    network.add_argument("--size", choices=SIZES, default="tiny")
    network.add_argument("--context", type=int, default=64)
    network.add_argument("--positions", choices=["learned", "rotary"], default="learned")
    network.add_argument("--tie", action="store_true", help="the last matrix is the embeddings of the tokens")
    network.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=600)
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--accumulate", type=int, default=1, help="micro-batches of --batch to a step")
    training.add_argument("--learning-rate", type=float, help="at its highest; default: by the optimizer")
    training.add_argument("--warmup", type=float, default=0.05, help="share of the steps over which the rate rises")
    training.add_argument("--checkpoint", type=Path, help="where to keep the run")
    training.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    training.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    training.add_argument("--stop", type=int, help="leave off after this many of the steps")

    end = parser.add_argument_group("evaluation")
    end.add_argument("--draws", type=int, default=8, help="of the weights, to average over")
    end.add_argument("--evaluation-tokens", type=int, default=65_536, help="of each text at most")
    end.add_argument("--prompt", default="\n")
    end.add_argument("--generate", type=int, default=200, metavar="TOKENS")
    end.add_argument("--figure", type=Path)
    end.add_argument("--json", type=Path)
    return parser.parse_args()


def host_module(host: str | None) -> tuple[str, ModuleType]:
    """The host asked for, or the first that is installed, and what it does; no other framework is imported."""
    installed = [name for name, modules in HOSTS.items() if all(map(importlib.util.find_spec, modules))]
    if not installed or host not in (None, *installed):
        sys.exit(f"{host or 'A host'} is not installed: install NumPyro or Pyro, and this project for it.")
    host = host or installed[0]
    return host, importlib.import_module(f"_transformer_{host}")


def configure(options: argparse.Namespace, corpus: Corpus, host: str, device: str) -> Config:
    size = SIZES[options.size]
    return Config(
        host=host,
        layers=size.layers,
        heads=size.heads,
        width=size.width,
        vocabulary=corpus.tokenizer.vocabulary,
        context=options.context,
        positions=options.positions,
        tie=options.tie,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate or LEARNING_RATES[options.optimizer],
        warmup=options.warmup,
        steps=options.steps,
        accumulate=options.accumulate,
        batch=options.batch,
        num_data=len(corpus.training),
        text_digest=hashlib.sha256(corpus.training.tobytes()).hexdigest(),
        dtype=options.dtype,
        device=device,
        seed=options.seed,
    )


class Training:
    """The steps of a run, and what was seen of them."""

    def __init__(self, run: Any, config: Config, corpus: Corpus) -> None:
        self.run, self.config, self.corpus = run, config, corpus
        self.losses: list[Any] = []
        self.seconds: list[float] = []

    def resume(self, path: Path) -> None:
        tensors, counters = load(path, self.config)
        self.losses = tensors.pop("losses").tolist()
        self.run.unpack(tensors, counters["run"])

    def save(self, path: Path) -> None:
        losses = np.array([float(loss) for loss in self.losses])
        tensors, rest = self.run.pack()
        save(path, {**tensors, "losses": losses}, self.config, {"steps": len(losses), "run": rest})

    def until(self, last: int, checkpoint: Path | None, save_every: int) -> None:
        first = len(self.losses)
        with tqdm(total=self.config.steps, initial=first, unit="step", dynamic_ncols=True) as bar:
            for step in range(first, last):
                start = time.perf_counter()
                self._step(step)
                if step > first:  # the loss of the step before: the device is at this one while we ask for it
                    self.losses[-2] = float(self.losses[-2])
                    bar.set_postfix(loss=f"{self.losses[-2]:.4f}", refresh=False)
                bar.update()
                self.seconds.append(time.perf_counter() - start)
                if checkpoint is not None and (step + 1 == last or (step + 1) % save_every == 0):
                    self.save(checkpoint)
        self.losses = [float(loss) for loss in self.losses]

    def _step(self, step: int) -> None:
        shape = (self.config.accumulate, self.config.batch)
        self.losses.append(self.run.step(*self.corpus.batch(shape, self.config.context, self.config.seed, step)))


def evaluate(
    run: Any, corpus: Corpus, config: Config, draws: Sequence[int | None], num_tokens: int
) -> tuple[dict[str, Prediction], dict[str, Prediction]]:
    """Predictions of the validation text by the mean of the weights and by draws, and those by draws of every text."""

    def at(tokens: np.ndarray, draws: Sequence[int | None]) -> Prediction:
        return predict(run, windows(tokens, config.batch, config.context, num_tokens), draws)

    averaged = at(corpus.validation, draws)
    mean = averaged if draws == [None] else at(corpus.validation, [None])
    strange = corpus.strange(np.random.default_rng(config.seed))
    by_text = {"validation": averaged, **{name: at(tokens, draws) for name, tokens in strange.items()}}
    return {"mean": mean, "averaged": averaged}, by_text


def tables(by_weights: dict[str, Prediction], by_text: dict[str, Prediction]) -> tuple[Table, Table]:
    quality = Table("weights", "loss", "perplexity", "accuracy", "calibration error", title="the next token, held out")
    for name, prediction in by_weights.items():
        loss, calibration = prediction.loss, Calibration.of(prediction)
        numbers = (loss, np.exp(loss), prediction.correct.mean(), calibration.error)
        quality.add_row(name, *(f"{number:.4f}" for number in numbers))
    doubt = Table("text", "loss", "entropy", "mutual information", title="uncertainty, in nats per token")
    for name, prediction in by_text.items():
        numbers = (prediction.loss, prediction.entropy.mean(), prediction.mutual_information.mean())
        doubt.add_row(name, *(f"{abs(number):.4f}" for number in numbers))  # rounding knows a negative zero
    return quality, doubt


def resident_memory() -> int:
    """The most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    options, console = arguments(), Console()
    host, module = host_module(options.host)
    device = module.find_device(options.device)
    vocabulary = options.vocabulary or SIZES[options.size].vocabulary
    corpus = Corpus.of(read(options.text, options.limit), options.tokens, vocabulary)
    config = configure(options, corpus, host, device)
    run = module.RUNS[options.optimizer](config)
    num_parameters = sum(int(np.prod(weight.shape)) for weight in layout(config))
    title = (
        f"{options.optimizer} on {host} ({device}), {num_parameters:,} weights, {config.num_data:,} training tokens "
        f"of {config.vocabulary} kinds"
    )
    console.print(title)

    training = Training(run, config, corpus)
    if options.resume:
        training.resume(options.resume)
    training.until(min(options.stop or config.steps, config.steps), options.checkpoint, options.checkpoint_every)
    if options.stop:
        return
    peak_memory = run.peak_memory() or resident_memory()  # of training, so before the rest

    draws = list(range(options.draws)) if run.has_draws and options.draws else [None]  # else all is at the mean
    by_weights, by_text = evaluate(run, corpus, config, draws, options.evaluation_tokens)
    for table in tables(by_weights, by_text):
        console.print(table)
    if options.generate:
        prompt = corpus.tokenizer.encode(options.prompt)
        prompt = prompt if len(prompt) else corpus.validation[:1]  # of what the vocabulary lacks nothing is left
        random = np.random.default_rng(config.seed)
        written = write(run, corpus.tokenizer, prompt, options.generate, config.context, draws, random)
        show(console, corpus.tokenizer.decode(prompt), written)

    calibrations = {name: Calibration.of(prediction) for name, prediction in by_weights.items()}
    if options.figure:
        from _transformer_figure import figure

        rates = schedule(config)(np.arange(len(training.losses)))
        figure(title, np.array(training.losses), rates, calibrations).savefig(options.figure, dpi=150)
    if options.json:
        report = {
            "host": host,
            "optimizer": options.optimizer,
            "size": options.size,
            "device": device,
            "parameters": num_parameters,
            "steps": len(training.losses),
            "learning_rate": config.learning_rate,
            "step_seconds_median": statistics.median(training.seconds) if training.seconds else None,
            "peak_memory_bytes": peak_memory,
            **{f"validation_loss_{name}": prediction.loss for name, prediction in by_weights.items()},
            **{f"calibration_error_{name}": calibration.error for name, calibration in calibrations.items()},
            **{f"entropy_{name}": float(prediction.entropy.mean()) for name, prediction in by_text.items()},
            **{
                f"mutual_information_{name}": float(prediction.mutual_information.mean())
                for name, prediction in by_text.items()
            },
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Text as tokens: where it comes from, how it is cut up, and the batches that a run sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["BytePairs", "Characters", "Corpus", "Tokenizer", "read", "windows"]

LIBRARY = Path(os.__file__).parent  # the sources of Python's own library
TRAINING_SHARE = 0.9


class Tokenizer(Protocol):
    vocabulary: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> str: ...


class Characters:
    """A token for each character of `text`; what else comes to be encoded is left out."""

    def __init__(self, text: str) -> None:
        self._characters = sorted(set(text))
        self._tokens = {character: token for token, character in enumerate(self._characters)}
        self.vocabulary = len(self._characters)

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._tokens[c] for c in text if c in self._tokens], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self._characters[token] for token in tokens)


class BytePairs:
    """Bytes, and pairs merged for being frequent in `text`, until there are as many tokens as asked for."""

    def __init__(self, text: str, vocabulary: int) -> None:
        import tokenizers  # characters do without

        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator([text], trainer)
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode([int(token) for token in tokens])


def read(path: Path | None, limit: int) -> str:
    """The first `limit` characters of a file, or of the modules of Python's library in the order of their names."""
    if path is not None:
        return path.read_text(encoding="utf-8")[:limit]
    text = ""
    for module in sorted(LIBRARY.glob("*.py")):
        if len(text) >= limit:
            break
        text += module.read_text(encoding="utf-8")
    return text[:limit].encode("ascii", "ignore").decode("ascii")  # the few others would be tokens without examples


@dataclass(frozen=True)
class Corpus:
    """A text in two parts, the second of which is never trained on."""

    tokenizer: Tokenizer
    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, text: str, tokens: str, vocabulary: int) -> Corpus:
        cut = int(TRAINING_SHARE * len(text))
        training, validation = text[:cut], text[cut:]
        # every character gets a token, lest the two parts speak of different texts; pairs are learnt from the first
        tokenizer = Characters(text) if tokens == "character" else BytePairs(training, vocabulary)
        return cls(tokenizer, tokenizer.encode(training), tokenizer.encode(validation))

    def batch(self, shape: tuple[int, ...], context: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, (*shape, context), by its seed and number alone: resuming needs no more."""
        random = np.random.default_rng((seed, step))
        starts = random.integers(len(self.training) - context, size=shape)
        tokens = self.training[starts[..., None] + np.arange(context + 1)]
        return tokens[..., :-1], tokens[..., 1:]

    def strange(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Texts that the corpus does not lead one to expect: a licence, and its own validation tokens shuffled."""
        texts = {"shuffled": random.permutation(self.validation)}
        licence = LIBRARY / "LICENSE.txt"  # not every distribution of Python ships it
        if licence.exists():
            texts["licence"] = self.tokenizer.encode(licence.read_text(encoding="utf-8"))
        return texts


def windows(tokens: np.ndarray, batch: int, context: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, side by side from the start of a text, in batches that are full, of `limit` tokens at most.

    A text too short for one batch makes a smaller one.
    """
    num_windows = min(len(tokens) - 1, limit) // context
    if num_windows == 0:
        raise ValueError(
            f"{min(len(tokens) - 1, limit)} tokens are too few to evaluate on with a context of {context}: give a "
            "longer text, a shorter context, or a higher limit."
        )
    batch = min(batch, num_windows)
    num_batches = num_windows // batch
    shape = (num_batches, batch, context)
    size = num_batches * batch * context
    yield from zip(tokens[:size].reshape(shape), tokens[1 : size + 1].reshape(shape), strict=True)

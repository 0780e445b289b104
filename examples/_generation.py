"""Text that a run writes, and how unsure it was of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from _text import Tokenizer
from rich.console import Console
from rich.text import Text

__all__ = ["Written", "show", "write"]


class Written(NamedTuple):
    """A text token by token, with the entropy of each, and the part of it on which draws of the weights disagree."""

    pieces: list[str]
    entropy: np.ndarray
    mutual_information: np.ndarray


class Predictor(Protocol):
    def next_log_probabilities(self, tokens: np.ndarray, draws: Sequence[int | None]) -> np.ndarray: ...


def write(
    run: Predictor,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    num_tokens: int,
    context: int,
    draws: Sequence[int | None],
    random: np.random.Generator,
) -> Written:
    """Continue `prompt`, every token drawn from what the draws of the weights predict on average."""
    tokens = prompt
    entropies: list[float] = []
    informations: list[float] = []
    for _ in range(num_tokens):
        log_probability = run.next_log_probabilities(tokens[-context:], draws).astype(float)
        probability = np.exp(log_probability)
        mean = probability.mean(0) / probability.mean(0).sum()  # float32 sums to one but for rounding
        entropy = -(mean * np.log(np.maximum(mean, 1e-300))).sum()
        entropies.append(entropy)
        informations.append(entropy + (probability * log_probability).sum(-1).mean())
        tokens = np.append(tokens, np.int32(random.choice(len(mean), p=mean)))
    pieces = [tokenizer.decode(token[None]) for token in tokens[len(prompt) :]]
    return Written(pieces, np.array(entropies), np.array(informations))


def show(console: Console, prompt: str, written: Written) -> None:
    """The text, darker where it was unsure; below each line, digits say how much of that the draws disagreed on.

    A nine is the largest mutual information of the text. Without draws there is none, and no digits.
    """
    entropy, information = written.entropy, written.mutual_information
    shade = entropy / max(entropy.max(), 1e-12)
    digit = np.rint(9 * information / information.max()).astype(int) if information.max() > 1e-6 else None
    text = Text(prompt, style="dim")
    digits = "".join("\n" if character == "\n" else " " for character in prompt)
    for number, piece in enumerate(written.pieces):
        level = round(255 - 140 * shade[number])
        text.append(piece, style=f"black on rgb(255,{level},{level})")
        mark = " " if digit is None else str(digit[number])
        digits += "".join("\n" if character == "\n" else mark for character in piece)
    for line, below in zip(text.split("\n"), digits.split("\n"), strict=True):
        for start in range(0, max(len(line), 1), console.width):
            console.print(line[start : start + console.width], no_wrap=True)
            if below[start : start + console.width].strip():
                console.print(below[start : start + console.width], style="blue", no_wrap=True, highlight=False)

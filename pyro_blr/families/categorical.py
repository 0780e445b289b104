"""The categorical distribution over 0, …, K − 1: T(z) = (1[z = k])_k, λ = logits, A = log Σ exp λ_k.

λ is determined up to a constant (the statistics sum to one), and so is ∇_μ E_q[f] = f(k) + constant: the rule
λ ← (1 − ρ) λ − ρ ℓ(k) needs no reference category.

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ._natural import Natural, family

__all__ = ["CategoricalNatural"]


@family(dist.Categorical, torch.distributions.Categorical)
class CategoricalNatural(Natural):
    """λ = logits, of shape [*batch, K]."""

    indicators: Tensor

    ranks = (1,)
    discrete = True
    host_parameters = (("logits",), ("probs",))

    @classmethod
    def from_distribution(cls, distribution: dist.Categorical) -> Self:
        return cls(distribution.logits.log_softmax(-1))

    def to_distribution(self) -> dist.Categorical:
        return dist.Categorical(logits=self.indicators.log_softmax(-1))

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        raise TypeError("a categorical site starts at its prior; a value does not tell the number of categories.")

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(one_hot(value.long(), self.num_values).to(self.indicators.dtype))

    def log_partition(self) -> Tensor:
        return self.indicators.logsumexp(-1)

    def to_expectation(self):
        return self.Expectation(self.indicators.softmax(-1))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(torch.log(expectation.indicators))

    def in_domain(self) -> Tensor:
        return self.indicators.isfinite().all(-1)

    def fisher_solve(self, gradient) -> Self:
        """The solution with mean zero over the categories; F = diag(p) − p pᵀ has the constants as its kernel."""
        solved = gradient.indicators / self.indicators.softmax(-1)
        return type(self)(solved - solved.mean(-1, keepdim=True))

    @property
    def num_values(self) -> int:
        return self.indicators.shape[-1]

    def probabilities(self) -> Tensor:
        """Of every value, [K, *batch]."""
        return self.indicators.softmax(-1).movedim(-1, 0)

    @classmethod
    def match_values(cls, values: Tensor) -> Self:
        """c from f at every value, [K, *batch]; with mean zero, so that what all values share takes no digits."""
        return cls((values - values.mean(0)).movedim(0, -1))

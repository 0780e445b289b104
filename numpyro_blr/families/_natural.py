"""The contract of an exponential family: natural parameters that add, and what Bayes' rule needs of them.

    q(z) = h(z) exp(⟨λ, T(z)⟩ − A(λ)),    μ = E_q[T(z)] = ∇A(λ),    F(λ) = ∇²A(λ)

A family is one class of natural parameters λ; its fields are named after the statistics T that they multiply. λ of a
batch of distributions has the batch in front. The expectation parameters μ and the statistics T(z) live in the dual
space, `Family.Expectation`, a class of its own with the same fields, so that the two are never added. A family gives
A, μ and its inverse, T, the host's distribution and the two rules below; what follows from these is written here once.

`sigma_points` are the fewest points with equal weights whose average of T is μ exactly. If ℓ is affine in T(z), they
integrate z out of it exactly. `match` returns the c with ∇f = ∇⟨c, T⟩ at those points, exact for f = ⟨c, T⟩ + constant:
then c is ∇_μ E_q[f], and the Bayesian learning rule λ ← (1 − ρ) λ − ρ c is Bayes' rule at ρ = 1.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 2; Wainwright & Jordan 2008, chapter 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from math import prod
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Expectation", "Natural", "at_both", "family", "natural_of", "smallest_spread"]

NaturalType = TypeVar("NaturalType", bound="Natural")


class Vector:
    """A point of a vector space whose components are the fields: + and − with its like, times numbers.

    A number scales the whole batch, an array of the batch's shape each of its members.
    """

    ranks: ClassVar[tuple[int, ...]]

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, self._alike(other))

    def __sub__(self, other: Self) -> Self:
        return jax.tree.map(jnp.subtract, self, self._alike(other))

    def __mul__(self, factor: Any) -> Self:
        """Times a number, or one for each distribution of the batch."""
        return type(self)(*(a * _over_event(factor, rank) for a, rank in zip(_leaves(self), self.ranks, strict=True)))

    def __rmul__(self, factor: Any) -> Self:
        return self * factor

    def __truediv__(self, divisor: Any) -> Self:
        return type(self)(*(a / _over_event(divisor, rank) for a, rank in zip(_leaves(self), self.ranks, strict=True)))

    def __neg__(self) -> Self:
        return jax.tree.map(jnp.negative, self)

    def inner(self, other: Any) -> Array:
        """⟨λ, μ⟩ with an element of the dual space, one number for each distribution of the batch."""
        pairs = zip(_leaves(self), _leaves(other), self.ranks, strict=True)
        return functools.reduce(jnp.add, (_sum_rightmost(a * b, rank) for a, b, rank in pairs))

    def __getitem__(self, index: Any) -> Self:
        """Members of the batch, by an index of its axes from the left."""
        return type(self)(*(leaf[index] for leaf in _leaves(self)))

    def sum(self, axis: int = 0) -> Self:
        """Over an axis of the batch, counted from the left."""
        return type(self)(*(leaf.sum(axis) for leaf in _leaves(self)))

    def where(self, condition: Array, otherwise: Self) -> Self:
        """This where the condition holds, `otherwise` elsewhere; the condition has the batch's shape."""
        chosen = [
            jnp.where(_over_event(condition, rank), a, b)
            for a, b, rank in zip(_leaves(self), _leaves(otherwise), self.ranks, strict=True)
        ]
        return type(self)(*chosen)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        leaves = zip(_leaves(self), self.ranks, strict=True)
        return jnp.broadcast_shapes(*(leaf.shape[: leaf.ndim - rank] for leaf, rank in leaves))

    def flat(self) -> Array:
        """All components in one last axis, [*batch, k]."""
        shape = self.batch_shape
        parts = [
            jnp.broadcast_to(leaf, (*shape, *leaf.shape[leaf.ndim - rank :])).reshape(*shape, -1)
            for leaf, rank in zip(_leaves(self), self.ranks, strict=True)
        ]
        return jnp.concatenate(parts, axis=-1)

    def like(self, flat: Array) -> Self:
        """The inverse of `flat`, with the event shapes of this one."""
        parts, start = [], 0
        for leaf, rank in zip(_leaves(self), self.ranks, strict=True):
            event = leaf.shape[leaf.ndim - rank :]
            parts.append(flat[..., start : start + prod(event)].reshape(*flat.shape[:-1], *event))
            start += prod(event)
        return type(self)(*parts)

    def _alike(self, other: Any) -> Any:
        if type(other) is not type(self):
            raise TypeError(
                f"{type(self).__name__} adds to its like, got {type(other).__name__}: Bayes' rule is the addition of "
                "natural parameters of one family. Convert the other one first, or take the members of one family."
            )
        return other


class Expectation(Vector):
    """μ = E_q[T(z)], or T(z) itself."""


class Natural(Vector):
    """λ, one subclass for each family; `family` registers it and makes its `Expectation`.

    Attributes:
        ranks: for each field, the number of axes of its event.
        value_rank: the number of axes of z's event.
        discrete: whether z takes integer values: 0, ..., `num_values` − 1, or all from 0 where that is None.
        host_parameters: the parameters that determine the host's distribution, in one or more ways.
    """

    ranks: ClassVar[tuple[int, ...]]
    value_rank: ClassVar[int] = 0
    discrete: ClassVar[bool] = False
    num_values: Any = None
    host_parameters: ClassVar[tuple[tuple[str, ...], ...]] = ()
    Expectation: ClassVar[type[Any]]

    # ------------------------------------------------------------------------------------------ what a family gives

    @classmethod
    def from_distribution(cls, distribution: Any) -> Self:
        """λ of the host's distribution."""
        raise NotImplementedError

    def to_distribution(self) -> Any:
        """The host's distribution."""
        raise NotImplementedError

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """A member that is concentrated, not much, around `value`: where a fit may start."""
        raise NotImplementedError

    def sufficient_statistics(self, value: Array) -> Any:
        """T(z)."""
        raise NotImplementedError

    def log_base_measure(self, value: Array) -> Array:
        """log h(z); zero unless the family says otherwise."""
        return self._zeros(value.shape[: value.ndim - self.value_rank])

    def base_slope(self, value: Array) -> Array:
        """∇ log h(z)."""
        return jnp.zeros_like(value)

    def expected_log_base_measure(self) -> Array:
        """E_q[log h(z)]."""
        return self._zeros(self.batch_shape)

    def log_partition(self) -> Array:
        """A(λ)."""
        raise NotImplementedError

    def to_expectation(self) -> Any:
        """μ = ∇A(λ)."""
        raise NotImplementedError

    @classmethod
    def from_expectation(cls, expectation: Any) -> Self:
        """λ with ∇A(λ) = μ."""
        raise NotImplementedError

    def in_domain(self) -> Array:
        """Whether λ is that of a proper distribution, for each of the batch; False for what is not finite."""
        raise NotImplementedError

    def widened(self, factor: float) -> Self:
        """A member with `factor` in (0, 1] times the information: on a ray from λ that stays inside the domain."""
        return self * factor

    @property
    def num_signs(self) -> int:
        """The number of ±1 that tell the sigma points apart."""
        return 1

    def sigma_points(self, signs: Array) -> Array:
        """Values [R, *batch, *event] whose average of T is μ, for balanced and uncorrelated `signs` [R, *batch, n]."""
        raise NotImplementedError

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        """c with ∇f = ∇⟨c, T⟩, from ∇f at the sigma points; both of shape [R, *batch, *event]."""
        raise NotImplementedError

    def probabilities(self) -> Array:
        """Of every value of a discrete z that takes finitely many, [num_values, *batch]."""
        raise NotImplementedError

    @classmethod
    def match_values(cls, values: Array) -> Self:
        """c = ∇_μ E_q[f] from f at every value, [num_values, *batch], of a discrete z that takes finitely many."""
        raise NotImplementedError

    def difference_weight(self, value: Array) -> Array:
        """v(z) with ∇_μ E_q[f] = E_q[v(z) (f(z + 1) − f(z))], of a discrete z that takes infinitely many values."""
        raise NotImplementedError

    @classmethod
    def match_difference(cls, difference: Array) -> Self:
        """c from E_q[v(z) (f(z + 1) − f(z))]."""
        raise NotImplementedError

    @classmethod
    def split(cls, value: Array) -> tuple[Array, ...]:
        """The values of the sites of which z is made; more than one for a joint family."""
        return (value,)

    @classmethod
    def join(cls, *values: Array) -> Array:
        """The inverse of `split`."""
        return values[0]

    @classmethod
    def along(cls, values: Array, gradients: Array) -> Array:
        """The part of a gradient that lies along the support, for supports of fewer dimensions than their values."""
        return gradients

    # --------------------------------------------------------------------------------------------- what follows from it

    def log_density(self, value: Array) -> Array:
        """log q(z) = log h(z) + ⟨λ, T(z)⟩ − A(λ)."""
        return self.log_base_measure(value) + self.inner(self.sufficient_statistics(value)) - self.log_partition()

    def entropy(self) -> Array:
        """H(q) = A(λ) − ⟨λ, μ⟩ − E_q[log h(z)]."""
        return self.log_partition() - self.inner(self.to_expectation()) - self.expected_log_base_measure()

    def kl_divergence(self, other: Self) -> Array:
        """KL(q_λ ‖ q_λ') = A(λ') − A(λ) − ⟨λ' − λ, μ⟩."""
        difference = self._alike(other) - self
        return other.log_partition() - self.log_partition() - difference.inner(self.to_expectation())

    def fisher_product(self, direction: Self) -> Any:
        """F(λ) d = d/dt ∇A(λ + t d), a change of μ."""
        return jax.jvp(lambda natural: natural.to_expectation(), (self,), (direction,))[1]

    def fisher_solve(self, gradient: Any) -> Self:
        """F(λ)⁻¹ g: from ∇_λ f, which lives where μ does, to the natural gradient ∇_μ f, which lives where λ does."""
        shape, point = self.batch_shape, self.flat()
        size = point.shape[-1]

        def expectation(flat: Array) -> Array:
            return self.like(flat).to_expectation().flat()

        fisher = jax.vmap(jax.jacfwd(expectation))(point.reshape(-1, size))
        gradient_flat = jnp.broadcast_to(gradient.flat(), (*shape, size)).reshape(-1, size)
        solved = jnp.linalg.solve(fisher, gradient_flat[..., None])[..., 0]
        return self.like(solved.reshape(*shape, size))

    def step(self, target: Self, rate: Array) -> Self:
        """λ ← (1 − ρ) λ + ρ λ', the straight step; inside the domain for every λ' inside and ρ in [0, 1]."""
        return self * (1 - rate) + target * rate

    def safe_step(self, direction: Self, rate: Array) -> Self:
        """λ + ρ d wherever that stays well inside the domain, and the geodesic correction of it elsewhere.

        The corrected step is λ + ρ d − (ρ²/4) F⁻¹ ∇³A(d, d), the second-order expansion of a geodesic, with ρ halved
        until it too stays inside (at most 60 times; then λ stays). The straight step is taken where λ + 2 ρ d / (1 + ρ)
        is inside as well: a step keeps about half of what separates λ from the boundary.

        Source: Lin, Schmidt & Khan 2020, "Handling the Positive-Definite Constraint in the Bayesian Learning Rule".
        """
        straight = self + direction * rate
        inside = straight.in_domain() & (self + direction * (2 * rate / (1 + rate))).in_domain()

        def corrected() -> Any:
            # where the direction is not finite nothing moves, and where the straight step serves nothing is needed
            finite = jnp.isfinite(direction.flat()).all(-1)
            usable = direction.where(finite & ~inside, self * 0)
            bend = self.fisher_solve(self._second_derivative(usable))

            def moved(length: Array) -> Any:
                return self + usable * length - bend * (length**2 / 4)

            def halve(_: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
                length = jnp.where(carry[1].in_domain(), carry[0], carry[0] / 2)
                return length, moved(length)

            start = jnp.broadcast_to(jnp.asarray(rate, bend.flat().dtype), inside.shape)
            # the loop carries the point, so that the one that is tested is, to the last bit, the one that is returned
            _, bent = jax.lax.fori_loop(0, 60, halve, (start, moved(start)))
            return straight.where(inside, bent.where(bent.in_domain() & finite, self))

        return jax.lax.cond(inside.all(), lambda: straight, corrected)

    def _second_derivative(self, direction: Self) -> Any:
        """∇³A(d, d) = d²/dt² ∇A(λ + t d)."""
        return jax.jvp(lambda natural: natural.fisher_product(direction), (self,), (direction,))[1]

    def _zeros(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, _leaves(self)[0].dtype)


@dataclass_transform(frozen_default=True)
def family(*distributions: type) -> Callable[[type[NaturalType]], type[NaturalType]]:
    """Makes a subclass of `Natural` a family: a frozen dataclass, a pytree, with an `Expectation` of the same fields.

    Args:
        distributions: the host's distributions that are members; `natural_of` and the guides find the family by them.
    """

    def register(cls: type[NaturalType]) -> type[NaturalType]:
        cls = jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        expectation = make_dataclass(
            cls.__name__.removesuffix("Natural") + "Expectation",
            [(name, Array) for name in names],
            bases=(Expectation,),
            namespace={"ranks": cls.ranks, "__module__": cls.__module__, "__doc__": f"μ of {cls.__name__}."},
            frozen=True,
        )
        cls.Expectation = jax.tree_util.register_dataclass(expectation)
        for distribution in distributions:
            natural_of.register(distribution, cls.from_distribution)
        return cls

    return register


@functools.singledispatch
def natural_of(distribution: Any) -> Natural:
    """λ of a host's distribution, as its family has it.

    Raises:
        TypeError: the distribution belongs to no registered family.
    """
    raise TypeError(
        f"{type(distribution).__name__} belongs to no registered exponential family. Register one with "
        "`@family(...)` above a subclass of `Natural`, or give the site a distribution that has one."
    )


def family_of(distribution: type, **default: Any) -> Any:
    """The family of a host's class of distributions.

    Args:
        default: `default=value` returns that value instead of raising TypeError.
    """
    rule = natural_of.dispatch(distribution)
    if rule is natural_of.dispatch(object):
        if "default" in default:
            return default["default"]
        raise TypeError(f"{distribution.__name__} belongs to no registered exponential family; see `family`.")
    return rule.__self__  # type: ignore[attr-defined]


def at_both(values: Array, signs: Array) -> tuple[Array, Array]:
    """The averages of `values` [R, ...] over the runs with sign +1 and with sign −1, `signs` [R, ...] balanced."""
    return ((1 + signs) * values).mean(0), ((1 - signs) * values).mean(0)


def smallest_spread(dtype: Any) -> float:
    """The least distance, relative to their size, at which two sigma points are told apart."""
    return 2 * float(jnp.finfo(dtype).eps) ** 0.5


def _leaves(vector: Any) -> list[Array]:
    return [getattr(vector, item.name) for item in fields(vector)]


def _over_event(factor: Any, rank: int) -> Any:
    """A number for each of the batch, with an axis of length one for each axis of the event."""
    return jnp.reshape(factor, (*jnp.shape(factor), *[1] * rank)) if jnp.ndim(factor) else factor


def _sum_rightmost(array: Array, rank: int) -> Array:
    return array.sum(tuple(range(array.ndim - rank, array.ndim))) if rank else array

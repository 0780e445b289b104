"""The guide that gives every latent site the exponential family of its prior or of its support.

    q(z) = Π_s q_s(z_s; λ_s)

with one natural parameter λ_s for each site, batched over its plates. Under `BLR` each site moves by
λ_s ← (1 − ρ) λ_s − ρ ∇_{μ_s} E_q[ℓ]; where the model is conditionally conjugate that is coordinate-ascent variational
Bayes, and where it is conjugate, Bayes' rule.

Source: Khan & Rue 2023, section 5; Hoffman, Blei, Wang & Paisley 2013.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor
from torch.distributions import biject_to

from ..families import (
    BernoulliNatural,
    BetaNatural,
    CategoricalNatural,
    DirichletNatural,
    GammaNatural,
    MultivariateNormalNatural,
    Natural,
    NormalGammaNatural,
    NormalNatural,
    NormalWishartNatural,
    WishartNatural,
    family_of,
)
from ..optim._conjugacy import find_roles
from ..optim._layout import JOINT, Member, plates_of, rows_of, undisturbed
from .natural_param import natural_param

__all__ = ["AutoExponentialFamily"]

MAX_DENSE_EVENT = 256
JOINT_FAMILIES = {
    (NormalNatural, GammaNatural): NormalGammaNatural,
    (MultivariateNormalNatural, WishartNatural): NormalWishartNatural,
}


class AutoExponentialFamily(AutoGuide):
    """Every latent site gets an exponential family of its own, mean field between sites.

    ======================================  ===========================================================================
    a prior that is                         gets
    ======================================  ===========================================================================
    a member of a registered family         that family (Gamma, Beta, Dirichlet, Bernoulli, Categorical, Poisson, ...);
                                            an Exponential prior gets its conjugate family, Gamma
    on the reals                            Normal; MultivariateNormal for vector events, see `dense`
    of a mean and a precision               NormalGamma, NormalWishart of both, where ℓ is affine in its statistics
    on the unit interval, the simplex       Beta, Dirichlet
    finite and discrete                     Bernoulli, Categorical
    on another constrained space            a Normal in the unconstrained space (on the positives: LogNormal)
    ======================================  ===========================================================================

    Sites that the model sums out (`infer={"enumerate": "parallel"}`, under TraceEnum_ELBO) are left to the loss.

    Args:
        families: the family of a site by its name: a class of natural parameters or a host's distribution class, for
            example `{"scale": dist.Gamma}`; `dist.Normal` also stands for a Normal in the unconstrained space.
        start: where a site starts, by its name: a value around which its family is concentrated, or a distribution.
            Other sites start around the value of `init_loc_fn`, discrete ones at their prior.
        dense: which sites on real vectors have full rank: True for all whose events have at most 256 coordinates,
            False for none, or their names.

    Raises:
        TypeError, ValueError: at the first call, for a site without a family, or names that are no latent sites.

    Example:
        >>> guide = AutoExponentialFamily(model)
        >>> svi = SVI(model, guide, BLR(), Trace_ELBO())
        >>> for _ in range(20):
        ...     svi.step(data)
        >>> guide.posterior()["rate"]
    """

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable = init_to_uniform,
        create_plates: Callable | None = None,
        families: Mapping[str, type] | None = None,
        start: Mapping[str, Any] | None = None,
        dense: bool | Collection[str] = True,
    ) -> None:
        def init_continuous(site: Any) -> Tensor:
            return site["fn"].sample() if site["fn"].support.is_discrete else init_loc_fn(site)

        super().__init__(InitMessenger(init_continuous)(model), create_plates=create_plates)
        self.families = dict(families or {})
        self.start = dict(start or {})
        self.dense = dense
        self._latents: dict[str, Any] = {}
        self._starts: dict[str, Natural] = {}
        self._transforms: dict[str, Any] = {}
        self._joint: dict[str, tuple[str, str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, natural in self._starts.items():
            sites = self._joint.get(name, (name,))
            site = self._latents[sites[-1]]
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                fn = self._distribution(name, natural)
                if name not in self._joint:
                    result[name] = pyro.sample(name, fn)
                    continue
                # a joint family's sites are drawn one given the other, and say to the optimizer what they are
                loc, precision = self._joint[name]
                notes: list[Any] = [{JOINT: (f"{name}_auto_natural", index)} for index in (0, 1)]
                result[precision] = pyro.sample(precision, fn.marginal(), infer=notes[1])
                result[loc] = pyro.sample(loc, fn.conditional(result[precision]), infer=notes[0])
        return result

    @torch.no_grad()
    def posterior(self) -> dict[str, Any]:
        """The fitted distribution of every site, over all rows of its plates; joint ones under both names, "x,τ"."""
        result = {}
        for name, natural in self.natural().items():
            if name in self._joint:
                result[name] = natural.to_distribution()
                continue
            event_dim = self._latents[name]["fn"].event_dim
            if name not in self._transforms:
                result[name] = natural.to_distribution().to_event(event_dim - natural.value_rank)
                continue
            transform = self._transforms[name]
            base = natural.to_distribution().to_event(_base_dim(transform, event_dim))
            result[name] = dist.TransformedDistribution(base, transform)
        return result

    @torch.no_grad()
    def natural(self) -> dict[str, Natural]:
        """The natural parameters λ of every site, which add and subtract; Normals on the unconstrained space."""
        naturals = {}
        with poutine.block():
            for name, start in self._starts.items():
                family = type(start)
                if name not in self._transforms:
                    leaves = (pyro.param(f"{name}_auto_natural.{key}", leaf) for key, leaf in vars(start).items())
                    naturals[name] = family(*(leaf.detach().clone() for leaf in leaves))
                else:
                    loc, scale = self._loc_and_scale(name, start, 0)
                    naturals[name] = family.from_distribution(dist.Normal(loc.detach(), scale.detach()))
        return naturals

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site, coordinate by coordinate."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every site, coordinate by coordinate: in closed form, or of 10,000 draws where there is none."""
        naturals = self.natural()
        result = {}
        for name, fn in self.posterior().items():
            levels = torch.as_tensor(quantiles).to(naturals[name].flat())
            result.update(self._quantiles(name, fn, naturals[name], levels))
        return result

    def _quantiles(self, name: str, fn: Any, natural: Natural, levels: Tensor) -> dict[str, Tensor]:
        value_dim = len(fn.batch_shape + fn.event_shape)
        expanded = levels.reshape((*levels.shape, *[1] * value_dim))
        base = natural.to_distribution()
        transform = self._transforms.get(name)
        try:
            if transform is None:
                return {name: base.icdf(expanded.expand((*levels.shape, *fn.batch_shape, *fn.event_shape)))}
            expanded = expanded if transform.sign > 0 else 1 - expanded
            return {name: transform(base.icdf(expanded))}
        except NotImplementedError:
            draws = fn.sample((10_000,)).to(levels.dtype)
            return {site: _quantiles_of(values, levels) for site, values in self._split(name, draws).items()}

    # ---------------------------------------------------------------------------------------------------- construction

    def _split(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """The values of the sites of which a member is made."""
        sites = self._joint.get(name, (name,))
        return dict(zip(sites, type(self._starts[name]).split(value), strict=True))

    def _distribution(self, name: str, natural: Natural) -> Any:
        if name in self._joint:
            return natural_param(f"{name}_auto_natural", natural)
        event_dim = self._latents[name]["fn"].event_dim
        if name not in self._transforms:
            return natural_param(f"{name}_auto_natural", natural, event_dim=event_dim - natural.value_rank)
        transform = self._transforms[name]
        base_dim = _base_dim(transform, event_dim)
        loc, scale = self._loc_and_scale(name, natural, base_dim)
        return dist.TransformedDistribution(dist.Normal(loc, scale).to_event(base_dim), transform)

    def _loc_and_scale(self, name: str, natural: Natural, event_dim: int) -> tuple[Tensor, Tensor]:
        start = natural.to_distribution()
        loc = pyro.param(f"{name}_auto_loc", start.loc, event_dim=event_dim)
        scale = pyro.param(
            f"{name}_auto_scale", start.scale, constraint=constraints.softplus_positive, event_dim=event_dim
        )
        return loc, scale

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        hidden = msg["type"] != "sample" or msg["is_observed"] or poutine.util.site_is_subsample(msg)
        return hidden or msg["infer"].get("enumerate") == "parallel"

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Singular sample detected")  # torch's Wishart says so of sound ones, too
            super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        self._latents = dict(prototype.iter_stochastic_nodes())
        self._check_names(self._latents)
        for name, site in self._latents.items():
            family, transform = self._family(name, site["fn"])
            if transform is not None:
                self._transforms[name] = transform
            self._starts[name] = self._start(name, site, family)
        self._join(args, kwargs)

    def _join(self, args: tuple, kwargs: dict) -> None:
        """Pairs of a mean and a precision get their joint family where ℓ is affine in its statistics."""
        for loc, precision in itertools.permutations(self._latents, 2):
            if loc not in self._starts or precision not in self._starts or {loc, precision} & self.families.keys():
                continue
            family = JOINT_FAMILIES.get((type(self._starts[loc]), type(self._starts[precision])))
            starts, sites = (self._starts[loc], self._starts[precision]), (self._latents[loc], self._latents[precision])
            if family is None or loc in self._transforms or sites[0]["fn"].batch_shape != sites[1]["fn"].batch_shape:
                continue
            if starts[0].batch_shape != starts[1].batch_shape:
                continue
            name = f"{loc},{precision}"
            values = [start.to_distribution().mean for start in starts]
            natural = family.from_value(family.join(*values))
            member = Member(name, (loc, precision), family, (name,), (), object, plates_of(sites[0]), False)
            (role,) = find_roles((member,), {name: natural}, self._evaluate_at(member, args, kwargs))
            if role.kind == "affine":
                del self._starts[loc], self._starts[precision]
                self._starts[name], self._joint[name] = natural, (loc, precision)

    def _evaluate_at(self, member: Member, args: tuple, kwargs: dict) -> Callable:
        """−log p and its gradient as functions of the member's values, all other sites as the prototype has them."""
        with undisturbed(0), poutine.block():
            model = poutine.replay(self.model, trace=self.prototype_trace)
            given: Any = poutine.trace(model).get_trace(*args, **kwargs)  # with the rows of subsampled plates
        indices = {name: site["value"] for name, site in given.nodes.items() if site["type"] == "sample"}

        def loss_at(value: Tensor) -> Tensor:
            trace = given.copy()
            for site, part in zip(member.sites, member.family.split(value), strict=True):
                rows = rows_of(part, part.ndim, self._latents[site], indices)
                trace.nodes[site] = {**trace.nodes[site], "value": rows}
            with undisturbed(0), poutine.block():
                return -poutine.trace(poutine.replay(self.model, trace=trace)).get_trace(*args, **kwargs).log_prob_sum()

        def evaluate_at(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            own = values[member.name].detach().clone().requires_grad_()
            with torch.enable_grad():
                losses = torch.stack([loss_at(value) for value in own.unbind()])
                (slopes,) = torch.autograd.grad(losses.sum() + 0 * own.sum(), own)
            return losses.detach(), {member.name: slopes}

        return evaluate_at

    def _check_names(self, latents: Mapping[str, Any]) -> None:
        named: dict[str, Collection[str]] = {"families": self.families, "start": self.start}
        named["dense"] = () if isinstance(self.dense, bool) else self.dense
        for argument, names in named.items():
            unknown = [name for name in names if name not in latents]
            if unknown:
                raise ValueError(
                    f"{argument} names {', '.join(map(repr, unknown))}, which is no latent site of the model; "
                    f"its latent sites are {', '.join(map(repr, latents)) or 'none'}."
                )

    def _family(self, name: str, prior: Any) -> tuple[type[Natural], Any]:
        """The site's family, and the transform from the space on which it is one, where that is not the site's own."""
        support, base = prior.support, _base(prior)
        if name in self.families:
            chosen = self.families[name]
            family = chosen if issubclass(chosen, Natural) else family_of(chosen)
            if family is NormalNatural and not _is_real(support):
                return family, biject_to(support)
            return family, None
        if isinstance(base, torch.distributions.Exponential):
            return GammaNatural, None
        family = family_of(type(base), default=None)
        if _is_real(support) and family in (None, NormalNatural, MultivariateNormalNatural):  # VonMises is no Normal
            dense = self.dense if isinstance(self.dense, bool) else name in self.dense
            vector = prior.event_dim == 1 and 1 < prior.event_shape[-1] <= MAX_DENSE_EVENT
            return (MultivariateNormalNatural if dense and vector else NormalNatural), None
        if family is not None:
            return family, None
        constraint = _base_constraint(support)
        if constraint is constraints.unit_interval or _is_unit(constraint):
            return BetaNatural, None
        if constraint is constraints.simplex:
            return DirichletNatural, None
        if constraint is constraints.boolean:
            return BernoulliNatural, None
        if support.is_discrete:
            if prior.has_enumerate_support and getattr(constraint, "lower_bound", None) == 0:
                return CategoricalNatural, None
            raise TypeError(
                f"AutoExponentialFamily has no family for the discrete site '{name}' ({type(base).__name__}). Give one "
                "in `families`, sum the site out (`infer={'enumerate': 'parallel'}` with TraceEnum_ELBO), or register "
                "a family of your own."
            )
        return NormalNatural, biject_to(support)

    @torch.no_grad()
    def _start(self, name: str, site: Any, family: type[Natural]) -> Natural:
        given = self.start.get(name)
        if isinstance(given, torch.distributions.Distribution):
            natural = family.from_distribution(_base(given))
        elif given is None and family is CategoricalNatural:
            natural = self._prior_logits(site)
        else:
            value = site["value"].detach()
            if given is not None:
                value = torch.as_tensor(given, dtype=value.dtype, device=value.device).expand(value.shape)
            if name in self._transforms:
                value = self._transforms[name].inv(value)
            natural = family.from_value(value)
        natural = self._expanded(natural, site, name)
        return self._repeated(natural, site)

    def _prior_logits(self, site: Any) -> Natural:
        base = _base(site["fn"])
        logits = base.log_prob(base.enumerate_support()).movedim(0, -1)
        return CategoricalNatural(logits.log_softmax(-1))

    def _expanded(self, natural: Natural, site: Any, name: str) -> Natural:
        """Over the whole batch of the site."""
        shape = site["value"].shape
        if name in self._transforms:
            shape = self._transforms[name].inverse_shape(shape)
        shape = shape[: len(shape) - natural.value_rank]
        leaves = zip(vars(natural).values(), natural.ranks, strict=True)
        return type(natural)(*(leaf.expand((*shape, *leaf.shape[leaf.ndim - rank :])) for leaf, rank in leaves))

    def _repeated(self, natural: Natural, site: Any) -> Natural:
        """Over all rows of subsampled plates."""
        for frame in site["cond_indep_stack"]:
            full_size = frame.full_size or frame.size
            if full_size != frame.size:
                axis = frame.dim + len(site["fn"].batch_shape)
                leaves = vars(natural).values()
                rows = torch.arange(full_size, device=next(iter(leaves)).device) % frame.size
                natural = type(natural)(*(leaf.index_select(axis, rows) for leaf in leaves))
        return natural


def _base(fn: Any) -> Any:
    while isinstance(fn, (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    draws, position = draws.sort(0).values, levels * (len(draws) - 1)  # torch.quantile takes no more than 2**24 numbers
    below = position.long().clamp(max=len(draws) - 2)
    share = (position - below).reshape((*levels.shape, *[1] * (draws.ndim - 1)))
    return draws[below].lerp(draws[below + 1], share)


def _base_dim(transform: Any, event_dim: int) -> int:
    return event_dim - transform.codomain.event_dim + transform.domain.event_dim


def _base_constraint(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_real(support: Any) -> bool:
    return _base_constraint(support) is constraints.real


def _is_unit(constraint: Any) -> bool:
    """Whether an interval is that from 0 to 1, as the support of Uniform(0, 1) is."""
    if not isinstance(constraint, type(constraints.interval(0, 1))):
        return False
    lower, upper = (torch.as_tensor(bound) for bound in (constraint.lower_bound, constraint.upper_bound))
    return bool((lower == 0).all() and (upper == 1).all())

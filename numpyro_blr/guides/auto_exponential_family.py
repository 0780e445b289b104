"""The guide that gives every latent site the exponential family of its prior or of its support.

    q(z) = Π_s q_s(z_s; λ_s)

with one natural parameter λ_s for each site, batched over its plates. Under `BLR` each site moves by
λ_s ← (1 − ρ) λ_s − ρ ∇_{μ_s} E_q[ℓ]; where the model is conditionally conjugate that is coordinate-ascent variational
Bayes, and where it is conjugate, Bayes' rule.

Source: Khan & Rue 2023, section 5; Hoffman, Blei, Wang & Paisley 2013.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import Predictive, init_to_uniform
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import log_density

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
from ..optim._layout import JOINT, Member, plates_of, rows_of, subsampled
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
        >>> result = SVI(model, guide, BLR(), Trace_ELBO()).run(rng_key, 20, data)
        >>> guide.posterior(result.params)["rate"]
    """

    def __init__(
        self,
        model: Callable,
        *,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_uniform,
        create_plates: Callable | None = None,
        families: Mapping[str, type] | None = None,
        start: Mapping[str, Any] | None = None,
        dense: bool | Collection[str] = True,
    ) -> None:
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)
        self.families = dict(families or {})
        self.start = dict(start or {})
        self.dense = dense
        self._starts: dict[str, Natural] = {}
        self._transforms: dict[str, Any] = {}
        self._joint: dict[str, tuple[str, str]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, natural in self._starts.items():
            sites = self._joint.get(name, (name,))
            site = self.prototype_trace[sites[-1]]
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                fn = self._distribution(name, natural)
                if name not in self._joint:
                    result[name] = numpyro.sample(name, fn)
                    continue
                # a joint family's sites are drawn one given the other, and say to the optimizer what they are
                loc, precision = self._joint[name]
                param = f"{name}_{self.prefix}_natural"
                result[precision] = numpyro.sample(precision, fn.marginal(), infer={JOINT: (param, 1)})
                conditional = fn.conditional(result[precision])
                result[loc] = numpyro.sample(loc, conditional, infer={JOINT: (param, 0)})
        return result

    def posterior(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The fitted distribution of every site, over all rows of its plates; joint ones under both names, "x,τ".

        Args:
            params: the guide's parameters, `svi.get_params(state)`.
        """
        with handlers.block(), handlers.substitute(data=params):
            return {name: self._distribution(name, natural) for name, natural in self._starts.items()}

    def natural(self, params: Mapping[str, Any]) -> dict[str, Natural]:
        """The natural parameters λ of every site, which add and subtract; Normals on the unconstrained space."""
        naturals = {}
        for name, start in self._starts.items():
            if name not in self._transforms:
                naturals[name] = params[f"{name}_{self.prefix}_natural"]
            else:
                loc, scale = (params[f"{name}_{self.prefix}_{kind}"] for kind in ("loc", "scale"))
                naturals[name] = type(start).from_distribution(dist.Normal(loc, scale))
        return naturals

    def sample_posterior(
        self, rng_key: Array, params: Mapping[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of every latent site, and of the model's deterministic ones."""
        draws = {}
        for index, (name, fn) in enumerate(self.posterior(params).items()):
            draws.update(self._split(name, fn.sample(jax.random.fold_in(rng_key, index), sample_shape)))
        deterministic = [name for name, site in self.prototype_trace.items() if site["type"] == "deterministic"]
        if not deterministic:
            return draws
        predictive = Predictive(
            self.model, posterior_samples=draws, return_sites=deterministic, batch_ndims=len(sample_shape)
        )
        return {**draws, **predictive(rng_key, *args, **kwargs)}

    def median(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """The median of every site, coordinate by coordinate."""
        return {name: values[0] for name, values in self.quantiles(params, [0.5]).items()}

    def quantiles(self, params: Mapping[str, Any], quantiles: Any) -> dict[str, Array]:
        """Quantiles of every site, coordinate by coordinate: in closed form, or of 10,000 draws where there is none."""
        levels = jnp.asarray(quantiles)
        result = {}
        for index, (name, fn) in enumerate(self.posterior(params).items()):
            base = fn.base_dist if isinstance(fn, dist.Independent) else fn
            shape = fn.batch_shape + fn.event_shape
            try:
                expanded = levels.reshape(*levels.shape, *[1] * len(shape))
                result[name] = base.icdf(jnp.broadcast_to(expanded, (*levels.shape, *shape)))
            except (NotImplementedError, ImportError):  # some of the host's are those of an optional package
                draws = self._split(name, fn.sample(jax.random.key(index), (10_000,)))
                for site, values in draws.items():
                    result[site] = jnp.quantile(values.astype(levels.dtype), levels, axis=0)
        return result

    # ---------------------------------------------------------------------------------------------------- construction

    def _split(self, name: str, value: Array) -> dict[str, Array]:
        """The values of the sites of which a member is made."""
        sites = self._joint.get(name, (name,))
        return dict(zip(sites, type(self._starts[name]).split(value), strict=True))

    def _distribution(self, name: str, natural: Natural) -> Any:
        if name in self._joint:
            return natural_param(f"{name}_{self.prefix}_natural", natural)
        event_dim = self.prototype_trace[name]["fn"].event_dim
        if name not in self._transforms:
            return natural_param(f"{name}_{self.prefix}_natural", natural, event_dim=event_dim - natural.value_rank)
        transform = self._transforms[name]
        base_dim = event_dim - transform.codomain.event_dim + transform.domain.event_dim
        start = natural.to_distribution()
        loc = numpyro.param(f"{name}_{self.prefix}_loc", start.loc, event_dim=base_dim)
        scale = numpyro.param(
            f"{name}_{self.prefix}_scale", start.scale, constraint=constraints.softplus_positive, event_dim=base_dim
        )
        return dist.TransformedDistribution(dist.Normal(loc, scale).to_event(base_dim), transform)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        rng_key = numpyro.prng_key()
        with handlers.block():
            started = handlers.substitute(handlers.seed(self.model, rng_key), substitute_fn=self.init_loc_fn)
            self.prototype_trace = handlers.trace(started).get_trace(*args, **kwargs)
        latents = {
            name: site
            for name, site in self.prototype_trace.items()
            if site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate") != "parallel"
        }
        self._check_names(latents)
        for name, site in self.prototype_trace.items():
            if site["type"] == "plate":
                self._prototype_frame_full_sizes[name] = site["args"][0]
        for name, site in latents.items():
            for frame in site["cond_indep_stack"]:
                self._prototype_frames[frame.name] = frame
            family, transform = self._family(name, site["fn"])
            if transform is not None:
                self._transforms[name] = transform
            self._starts[name] = self._start(name, site, family)
        self._join(latents, args, kwargs)

    def _join(self, latents: Mapping[str, Any], args: tuple, kwargs: dict) -> None:
        """Pairs of a mean and a precision get their joint family where ℓ is affine in its statistics."""
        for loc, precision in itertools.permutations(latents, 2):
            if loc not in self._starts or precision not in self._starts or {loc, precision} & self.families.keys():
                continue
            family = JOINT_FAMILIES.get((type(self._starts[loc]), type(self._starts[precision])))
            starts, sites = (self._starts[loc], self._starts[precision]), (latents[loc], latents[precision])
            if family is None or loc in self._transforms or sites[0]["fn"].batch_shape != sites[1]["fn"].batch_shape:
                continue
            if starts[0].batch_shape != starts[1].batch_shape:
                continue
            name = f"{loc},{precision}"
            values = [start.to_distribution().mean for start in starts]
            natural = family.from_value(family.join(*values))
            member = Member(
                name,
                (loc, precision),
                family,
                (name,),
                (),
                object,
                plates_of(sites[0], self.prototype_trace),
                False,
                (),
            )
            (role,) = find_roles((member,), {name: natural}, self._evaluate_at(member, latents, args, kwargs))
            if role.kind == "affine":
                del self._starts[loc], self._starts[precision]
                self._starts[name], self._joint[name] = natural, (loc, precision)

    def _evaluate_at(self, member: Member, latents: Mapping[str, Any], args: tuple, kwargs: dict) -> Callable:
        """−log p and its gradient as functions of the member's values, all other sites as the prototype has them."""
        fixed = {name: site["value"] for name, site in latents.items() if name not in member.sites}
        plates = {name: site["value"] for name, site in self.prototype_trace.items() if site["type"] == "plate"}

        def loss_at(value: Array) -> Array:
            frames = subsampled(latents[member.sites[0]], self.prototype_trace)
            given = {
                site: rows_of(part, latents[site]["fn"].event_dim, frames)
                for site, part in zip(member.sites, member.family.split(value), strict=True)
            }
            model = handlers.seed(handlers.substitute(self.model, data=plates), 0)
            with handlers.block():
                return -log_density(model, args, kwargs, {**fixed, **given})[0]

        def evaluate_at(values: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            losses, slopes = jax.lax.map(jax.value_and_grad(loss_at), values[member.name])
            return losses, {member.name: slopes}

        return evaluate_at

    def _check_names(self, latents: Mapping[str, Any]) -> None:
        named = {"families": self.families, "start": self.start}
        named["dense"] = {} if isinstance(self.dense, bool) else dict.fromkeys(self.dense)
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
            family = chosen if isinstance(chosen, type) and issubclass(chosen, Natural) else family_of(chosen)
            if family is NormalNatural and not _is_real(support):
                return family, biject_to(support)
            return family, None
        if isinstance(base, dist.Exponential):
            return GammaNatural, None
        if _is_real(support):
            dense = self.dense if isinstance(self.dense, bool) else name in self.dense
            vector = prior.event_dim == 1 and 1 < prior.event_shape[-1] <= MAX_DENSE_EVENT
            return (MultivariateNormalNatural if dense and vector else NormalNatural), None
        family = family_of(type(base), default=None)
        if family is not None:
            return family, None
        constraint = support
        while isinstance(constraint, type(constraints.independent(constraints.real, 1))):
            constraint = constraint.base_constraint
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

    def _start(self, name: str, site: dict, family: type[Natural]) -> Natural:
        given = self.start.get(name)
        if isinstance(given, dist.Distribution):
            natural = family.from_distribution(_base(given))
        elif given is None and family is CategoricalNatural:
            natural = self._prior_logits(site)
        else:
            value = site["value"] if given is None else jnp.broadcast_to(jnp.asarray(given), site["value"].shape)
            if name in self._transforms:
                value = self._transforms[name].inv(value)
            natural = family.from_value(value if family.discrete else value.astype(float))
        natural = self._expanded(natural, site)
        return self._repeated(natural, site)

    def _prior_logits(self, site: dict) -> Natural:
        values = site["fn"].enumerate_support(expand=True)
        logits = jnp.moveaxis(jax.vmap(_base_log_prob(site["fn"]))(values), 0, -1)
        return CategoricalNatural(jax.nn.log_softmax(logits, -1))

    def _expanded(self, natural: Natural, site: dict) -> Natural:
        """Over the whole batch of the site."""
        value_shape = jnp.shape(site["value"])
        if site["name"] in self._transforms:
            value_shape = self._transforms[site["name"]].inverse_shape(value_shape)
        shape = value_shape[: len(value_shape) - natural.value_rank]
        leaves = zip(vars(natural).values(), natural.ranks, strict=True)
        return type(natural)(
            *(jnp.broadcast_to(leaf, (*shape, *leaf.shape[leaf.ndim - rank :])) for leaf, rank in leaves)
        )

    def _repeated(self, natural: Natural, site: dict) -> Natural:
        """Over all rows of subsampled plates."""
        for frame in site["cond_indep_stack"]:
            full_size = self._prototype_frame_full_sizes[frame.name]
            if full_size != frame.size:
                axis = frame.dim + len(site["fn"].batch_shape)
                rows = jnp.arange(full_size) % frame.size
                natural = jax.tree.map(lambda leaf, axis=axis, rows=rows: jnp.take(leaf, rows, axis), natural)
        return natural


def _base(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _base_log_prob(fn: Any) -> Callable[[Array], Array]:
    """log p elementwise, events not summed."""
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn.log_prob


def _is_unit(constraint: Any) -> bool:
    """Whether an interval is that from 0 to 1, as the support of Uniform(0, 1) is."""
    if not isinstance(constraint, type(constraints.interval(0, 1))):
        return False
    lower, upper = constraint.lower_bound, constraint.upper_bound
    traced = isinstance(lower, jax.core.Tracer) or isinstance(upper, jax.core.Tracer)
    return not traced and bool(np.all(lower == 0) and np.all(upper == 1))


def _is_real(support: Any) -> bool:
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)

"""A torch module with a prior on every weight, as one sample site, and the mean-field guide for it.

    p(w) = ∏ᵢ N(wᵢ; m₀, s₀²),    q(w) = ∏ᵢ N(wᵢ; mᵢ, σᵢ²)        w all weights of the module in one vector, [P]

with m₀ = 0 and s₀ = 1/√fan-in for a matrix; for a vector (biases, gains) m₀ is the average of its values at the start
and s₀ = 0.3. One site has one handler and one draw, where a site for each tensor costs dozens of both at every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import constraints

__all__ = ["AutoWeights", "BayesianModule", "Part"]


class Part(NamedTuple):
    """One tensor of the module within the vector of all.

    Attributes:
        name: of the parameter in the module.
        shape: of it.
        start, stop: its elements in the vector.
        loc: m₀ of its prior.
        scale: s₀.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    loc: float
    scale: float

    def of(self, weights: Tensor) -> Tensor:
        """This tensor, as a view of the vector."""
        return weights[self.start : self.stop].view(self.shape)


class BayesianModule(torch.nn.Module):
    """`module` with a prior on every weight: in a model, a call draws one site and runs the module with it.

    The module's own parameters become the starting point, `weights`, and are given up as parameters (they are moved to
    the meta device), so that nothing holds them twice.

    Args:
        module: any `torch.nn.Module`. Its buffers stay as they are, and parameters that are frozen
            (`requires_grad=False`); parameters that it uses twice are one.
        prior_scale: s₀. None: 1/√fan-in (the product of all axes but the first) for two axes and more, 0.3 for fewer. A
            number, for all; or a function of (name, parameter).
        name: of the sample site.

    Attributes:
        weights: [P], one parameter after another in the order of `parts`. `AutoWeights` starts there and moves this
            very tensor.
        parts: where each parameter of the module lies in it, and its prior.

    Raises:
        TypeError: for a module without parameters that are trained, or with several dtypes.
        ValueError: for a prior_scale that is not positive; in a model, for a call within a plate.

    Example:
        >>> net = BayesianModule(torch.nn.Linear(3, 2))
        >>> def model(x, y):
        ...     logits = net(x)  # outside of the plate: all data have the same weights
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        >>> svi = SVI(model, AutoWeights(model, net), IVON(), Trace_ELBO())
    """

    weights: Tensor

    def __init__(
        self,
        module: torch.nn.Module,
        prior_scale: float | Callable[[str, Tensor], float] | None = None,
        *,
        name: str = "weights",
    ) -> None:
        super().__init__()
        named = {key: param for key, param in module.named_parameters() if param.requires_grad}
        dtypes = {param.dtype for param in named.values()}
        if len(dtypes) != 1:
            raise TypeError(
                f"BayesianModule expected a module with trained parameters of one dtype; {type(module).__name__} has "
                f"{', '.join(sorted(map(str, dtypes))) or 'none'}. Convert it, for example by module.float()."
            )
        self.name = name
        self.parts: list[Part] = []
        priors = {key: _prior_of(key, param, prior_scale) for key, param in named.items()}
        start = 0
        # What has the same prior is updated in one go, faster where shapes are the same. By names, scales and shapes,
        # and not by values that another start of the same module would not have: a stored vector of weights is to be
        # read as it was written.
        for key in sorted(named, key=lambda key: (priors[key][1], key.rpartition(".")[2], named[key].shape)):
            self.parts.append(Part(key, named[key].shape, start, start + named[key].numel(), *priors[key]))
            start += named[key].numel()
        self.register_buffer("weights", torch.cat([named[part.name].detach().reshape(-1) for part in self.parts]))
        # where each tensor is to be put for a call: (the module that has it, its name there), more than one if shared
        self._places = {
            part.name: [
                (owner, key)
                for owner in module.modules()
                for key, param in owner.named_parameters(recurse=False, remove_duplicate=False)
                if param is named[part.name]
            ]
            for part in self.parts
        }
        for part in self.parts:
            empty = torch.nn.Parameter(torch.empty(part.shape, dtype=self.weights.dtype, device="meta"), False)
            for owner, key in self._places[part.name]:
                owner.register_parameter(key, empty)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draws the weights from their prior, or takes what the guide or a handler says, and runs the module."""
        return self.apply_weights(pyro.sample(self.name, WeightsPrior(self.parts, self.weights)), *args, **kwargs)

    def apply_weights(self, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output at `weights`, [P]; differentiable with respect to them."""
        tensors = getattr(weights, "leaves", None)  # of a draw of IVON's, whose gradients arrive tensor by tensor
        if tensors is None:
            pieces = weights.split([part.stop - part.start for part in self.parts])
            tensors = {part.name: piece.view(part.shape) for part, piece in zip(self.parts, pieces, strict=True)}
        with self._placed(tensors):
            return self.module(*args, **kwargs)

    def get_extra_state(self) -> dict[str, float]:
        """m₀ of every part, which a module that starts elsewhere would choose differently; for `state_dict`."""
        return {part.name: part.loc for part in self.parts}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.parts = [part._replace(loc=float(state[part.name])) for part in self.parts]

    @contextmanager
    def _placed(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """The module with these for its parameters; what `torch.func.functional_call` does, looked up once."""
        before = [(owner, key, owner._parameters[key]) for places in self._places.values() for owner, key in places]
        try:
            for name, places in self._places.items():
                for owner, key in places:
                    owner._parameters[key] = tensors[name]  # type: ignore[assignment]
            yield
        finally:
            for owner, key, param in before:
                owner._parameters[key] = param


def _prior_of(name: str, param: Tensor, prior_scale: Any) -> tuple[float, float]:
    """(m₀, s₀)"""
    loc = float(param.detach().mean()) if param.ndim < 2 else 0.0
    if prior_scale is None:
        return loc, 0.3 if param.ndim < 2 else 1 / math.sqrt(max(1, param[0].numel()))
    scale = float(prior_scale(name, param) if callable(prior_scale) else prior_scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"prior_scale must be positive and finite, got {scale} for the parameter '{name}'.")
    return loc, scale


class WeightsPrior(TorchDistribution):
    """∏ᵢ N(wᵢ; m₀, s₀²) over the vector of all weights, part by part."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, parts: list[Part], like: Tensor) -> None:
        self.parts, self.like = parts, like
        super().__init__(event_shape=like.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        raise ValueError(
            f"a BayesianModule has one vector of weights for all data, and was asked for {tuple(batch_shape)} of them. "
            "Call it outside of plates, with vectorize_particles=False and Predictive(parallel=False)."
        )

    def _flat(self) -> tuple[Tensor, Tensor]:
        loc, scale = torch.empty_like(self.like), torch.empty_like(self.like)
        for part in self.parts:
            part.of(loc).fill_(part.loc)
            part.of(scale).fill_(part.scale)
        return loc, scale

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return dist.Normal(*self._flat()).rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(*self._flat()).log_prob(value).sum(-1)


class WeightsNormal(TorchDistribution):
    """q(w) of an `AutoWeights`, which computes its scales only when they are asked for."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, guide: AutoWeights, loc: Tensor) -> None:
        self.guide, self.loc = guide, loc
        super().__init__(event_shape=loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return self._normal().expand(batch_shape)

    def _normal(self) -> Any:
        return dist.Normal(self.loc, self.guide.scale()).to_event(1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._normal().rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._normal().log_prob(value)


class AutoWeights(AutoGuide):
    """The mean-field guide of a `BayesianModule`, for `IVON`, which moves it in place.

    q(w) = N(loc, diag(scale()²)). What it holds is the mean and the curvature, a copy of the weights each; the scale
    follows from the curvature. Its draws carry no gradient: for another optimizer, or for a model with other latent
    sites beside the weights, take `AutoNormal` or an `AutoGuideList` with one of these for each.

    Args:
        model: whose only latent site, but for those that other guides have, is `net`'s.
        net: the module. Its `weights` are where the mean starts, and move with it.
        init_scale: σ before the first step, at which `IVON` puts its own.

    Attributes:
        loc: the mean, [P].
        hessian: h, the curvature of the averaged loss, [P].

    Raises:
        RuntimeError: in a step of an optimizer that is not `IVON`.
    """

    moved_in_place = True
    hessian: Tensor
    num_data: Tensor
    temperature: Tensor

    def __init__(self, model: Callable, net: BayesianModule, init_scale: float = 0.01) -> None:
        super().__init__(model)
        self.init_scale = init_scale
        object.__setattr__(self, "net", net)  # no submodule: the model has it
        self.loc = torch.nn.Parameter(net.weights)  # the same storage
        self.register_buffer("hessian", torch.zeros_like(net.weights))
        self.register_buffer("num_data", torch.zeros((), dtype=torch.float64))  # N; 0 until `IVON` has read the model
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))  # τ

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A draw of the weights, by the name of their site."""
        _check_optimizer()
        loc = self.loc  # noted by the handlers of SVI, for the optimizer
        return {self.net.name: pyro.sample(self.net.name, WeightsNormal(self, loc.detach()))}

    def get_extra_state(self) -> dict[str, float]:
        """m₀ of every part: with it, `state_dict` has all of q and of the prior."""
        return self.net.get_extra_state()

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.net.set_extra_state(state)

    def scale(self) -> Tensor:
        """σ = √(τ / (N (h + δ))), [P]; `init_scale` before the first step."""
        num_data = float(self.num_data)
        if num_data == 0:
            return torch.full_like(self.hessian, self.init_scale)
        precision = torch.empty_like(self.hessian)
        for part in self.net.parts:
            torch.add(part.of(self.hessian), 1 / (num_data * part.scale**2), out=part.of(precision))
        return precision.mul_(num_data / float(self.temperature)).rsqrt_()

    def tie(self) -> None:
        """Makes the mean the network's `weights` again, which `to` and `double` of the two of them part."""
        weights = self.net.weights
        if (weights.dtype, weights.device) != (self.loc.dtype, self.loc.device):
            raise TypeError(
                f"AutoWeights has a mean of {self.loc.dtype} on {self.loc.device}, and its network weights of "
                f"{weights.dtype} on {weights.device}. Convert both, net.to(...) and guide.to(...)."
            )
        self.net.weights = self.loc.detach()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mean of the weights, by the name of their site."""
        return {self.net.name: self.loc.detach()}


def _check_optimizer() -> None:
    """Raises in a step of an optimizer that does not move the guide in place: nothing would ever move it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not SVI.step.__code__:
        frame = frame.f_back
    if frame is not None and not getattr(frame.f_locals["self"].optim, "moves_weights", False):
        raise RuntimeError(
            f"AutoWeights is moved by IVON alone, and SVI has {type(frame.f_locals['self'].optim).__name__}: its draws "
            "carry no gradient. Use IVON, or AutoNormal with init_loc_fn=init_to_value(values={net.name: net.weights})."
        )

"""How often does one see a doctor in a year, by one's health and by the share of the bill that one pays?

The RAND Health Insurance Experiment drew its families' insurance by lot: 20,190 person-years, four states of health,
five shares of the bill. A visit count is Poisson, and each of the twenty groups has a rate of its own with a gamma
prior: conjugate, so that one step of `BLR(learning_rate=1.0)` is the exact posterior. Then the prior's scale is unknown
as well, and the groups lend each other strength: conditionally conjugate, so that steps are sweeps of coordinate
ascent, and a few reach their fixed point. What its mean field leaves out is measured against the exact posterior, an
integral over one number: little. Groups of thousands stay where they were, those of a few dozen move towards the rest.

(Visits vary more than Poisson counts do, as some of the people are ill all year; read the spreads with that in mind.)
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.special import gammaln
from statsmodels.datasets import randhie

from pyro_blr import BLR, AutoExponentialFamily

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings

HEALTH = ("excellent", "good", "fair", "poor")
SHARES = (0, 25, 50, 95, 100)  # per cent of the bill
SHAPE = 5.0  # of the rates' prior: groups that differ by some 45 per cent


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """The visits of every person and year, and which of the 4 × 5 groups it belongs to."""
    table = randhie.load_pandas().data
    health = table["hlthg"] + 2 * table["hlthf"] + 3 * table["hlthp"]
    share = np.searchsorted(SHARES, np.expm1(table["lncoins"]).round())
    return torch.tensor(table["mdvis"].to_numpy(float)), torch.tensor((len(SHARES) * health + share).to_numpy(int))


def model(visits, group, scale=None):
    """Given no scale, the rates' prior has an unknown one."""
    if scale is None:
        scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
    with pyro.plate("groups", len(HEALTH) * len(SHARES)):
        rate = pyro.sample("rate", dist.Gamma(SHAPE, scale))
    with pyro.plate("years", len(visits)):
        pyro.sample("visits", dist.Poisson(rate[group]), obs=visits)


def fit(num_steps: int, *args) -> dict[str, dist.Gamma]:
    """The posterior of every site, by name."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoExponentialFamily(model)
    svi = SVI(model, guide, BLR(learning_rate=1.0), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(*args)
    return guide.posterior()


def coordinate_ascent(totals, people) -> tuple[np.ndarray, np.ndarray, float]:
    """Where the sweeps end: concentration and rate of the groups' posteriors, and the mean of the scale's."""
    mean = 1.0
    for _ in range(100):
        concentration, rate = SHAPE + totals, mean + people
        mean = (1 + SHAPE * len(totals)) / (1 + (concentration / rate).sum())
    return concentration, rate, mean


def exact_rates(totals, people) -> np.ndarray:
    """The posterior means with an unknown scale, the rates integrated out in closed form and the scale on a grid."""
    scale = np.linspace(0.0, 6.0, 4001)[1:, None]
    log_density = SHAPE * np.log(scale) - (SHAPE + totals) * np.log(scale + people) + gammaln(SHAPE + totals)
    log_density = log_density.sum(1) - scale[:, 0]
    weight = np.exp(log_density - log_density.max())
    return ((SHAPE + totals) / (scale + people) * weight[:, None]).sum(0) / weight.sum()


def main() -> None:
    visits, group = data()
    people, totals = np.bincount(group), np.bincount(group, visits)

    one_step = fit(1, visits, group, 1.5)["rate"]
    np.testing.assert_allclose(one_step.concentration, SHAPE + totals, rtol=1e-10)
    np.testing.assert_allclose(one_step.rate, 1.5 + people, rtol=1e-10)

    together = fit(10, visits, group)
    concentration, rate, mean_scale = coordinate_ascent(totals, people)
    np.testing.assert_allclose(together["rate"].concentration, concentration, rtol=1e-10)
    np.testing.assert_allclose(together["rate"].rate, rate, rtol=1e-8)
    np.testing.assert_allclose(together["scale"].mean, mean_scale, rtol=1e-8)

    shrunk, spread = np.asarray(together["rate"].mean), np.asarray(together["rate"].variance) ** 0.5
    print("health     pays   person-years   mean   one step   unknown scale, 10 sweeps")
    names = [f"{health:9} {share:4}%" for health in HEALTH for share in SHARES]
    for row in zip(names, people, totals / people, one_step.mean, shrunk, spread, strict=True):
        print("{} {:14} {:6.2f} {:10.3f} {:10.3f} ± {:.3f}".format(*row))
    off = np.abs(shrunk - exact_rates(totals, people)) / spread
    print(f"the rates' prior mean: {SHAPE / mean_scale:.2f}; at most {off.max():.4f} sd from the exact means")
    assert off.max() < 0.02


if __name__ == "__main__":
    main()

"""The two packages are one subject: the same files, the same names in them, and neither needs the other's framework."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("numpyro_blr", "pyro_blr")
FILES = {name: {str(path.relative_to(ROOT / name)) for path in (ROOT / name).rglob("*.py")} for name in PACKAGES}
MODULES = sorted(FILES["numpyro_blr"] & FILES["pyro_blr"])
FRAMEWORKS = {"numpyro_blr": ("jax", "numpyro"), "pyro_blr": ("torch", "pyro")}

# What one host asks for and the other does not; everything else has the same name and the same parameters in both. A
# name that no longer differs has to leave the list. `_svi.py`, `_layout.py`, `_recognition.py` and `_weights.py`,
# which know the host, share these alone.
OPTIONS = (
    "forward=",
    "differences=",
)  # of derivatives: JAX has a forward mode, and tells while it traces what it lacks
DIFFERENCES = {
    "__init__.py": {"__all__"},  # a torch module becomes one site by `BayesianModule`; NumPyro has its own for JAX's
    "guides/__init__.py": {"__all__"},
    # distributions that a host lacks are written to its own conventions
    "families/__init__.py": {
        "__all__",
    },
    "families/inverse_gaussian.py": {
        "InverseGaussian", "InverseGaussian.__init__", "InverseGaussian.expand", "InverseGaussian.rsample",
        "InverseGaussian.sample",
    },
    "families/inverse_wishart.py": {
        "InverseWishart", "InverseWishart.__init__", "InverseWishart.expand", "InverseWishart.log_prob",
        "InverseWishart.mean", "InverseWishart.rsample", "__all__",
    },
    "families/normal_gamma.py": {
        "LogOfLast", "LogOfLast.eq", "LogOfLast.log_abs_det_jacobian", "LogOfLast.tree_flatten", "NormalGamma",
        "NormalGamma.__init__", "NormalGamma.expand", "NormalGamma.rsample",
        "NormalGamma.sample", "RealAndPositive", "RealAndPositive.eq", "RealAndPositive.feasible_like",
        "RealAndPositive.tree_flatten",
    },
    "families/normal_wishart.py": {
        "LowerTriangleOfLast.eq", "LowerTriangleOfLast.forward_shape", "LowerTriangleOfLast.inverse_shape",
        "LowerTriangleOfLast.inverse_shape_of", "LowerTriangleOfLast.log_abs_det_jacobian",
        "LowerTriangleOfLast.tree_flatten", "NormalWishart", "NormalWishart.__init__", "NormalWishart.expand",
        "NormalWishart.rsample", "NormalWishart.sample", "RealAndPositiveDefinite.check",
        "RealAndPositiveDefinite.eq", "RealAndPositiveDefinite.feasible_like", "RealAndPositiveDefinite.tree_flatten",
    },
    "families/wishart.py": {"Wishart", "Wishart.rsample"},
    "families/von_mises_fisher.py": {
        "VonMisesFisher", "VonMisesFisher.__init__", "VonMisesFisher.expand", "VonMisesFisher.sample",
    },
    "fitting.py": {"fit"},  # JAX has keys, torch has seeds
    "results.py": {"Fit", "Fitted", "Fitted.now", "Fitted.restored"},  # Pyro's parameters are those of a global store
    "gradients/__init__.py": {"__all__"},
    "gradients/_estimate.py": {
        "__all__", "average_over_pairs", "each_draw", "value_and_gradient", "value_and_gradients",
        # an objective that was traced takes all draws at once, or all means; JAX maps over them
        "AtPoints", "AtPoints.at_points", "Transformation", "Vectorised", "Vectorised.at_all", "Vectorised.extras",
        "at_every_draw", "losses_of",
    },
    "gradients/_second.py": {
        # JAX refuses a derivative that there is none of, and torch has to be checked
        "__all__", "by_differences", "by_forward_mode", "gradient_of", "has_second_derivative", "NO_DERIVATIVE",
        "unknown", "where_known",
    },
    "gradients/hutchinson.py": {"__all__", "Graphs", "hutchinson", "product"},  # graphs of torch are kept
    # keys and seeds; JAX takes one pair at a time, and vectorises by itself
    "gradients/secant.py": {"Chords.mirrored", "__all__", "chords", "gradients_at"},
    "gradients/recycled.py": {"Moments", "Pool", "Pool.count", "append"},  # arrays of a fixed size, or that grow
    "gradients/drawn.py": {  # torch has seeds, and JAX has keys
        "__all__", "directions", "natural_gradients", "samples", "seeded",
    },
    "guides/auto_exponential_family.py": {
        # Pyro's parameters are in its store, and not an argument
        "AutoExponentialFamily.__init__", "AutoExponentialFamily.forward",
        "AutoExponentialFamily.median", "AutoExponentialFamily.natural", "AutoExponentialFamily.posterior",
        "AutoExponentialFamily.quantiles", "AutoExponentialFamily.sample_posterior",
    },
    "optim/_sweep.py": {
        # JAX has keys, torch has seeds
        "__all__", "keys_of", "natural_gradient", "place", "seeds_of", "sweep",
    },
    "optim/contributions.py": {"site_contributions"},  # the state is an argument, or the optimizer's own
    "optim/_gaussian.py": {
        # arrays under a tracer are selected, concrete ones are looked at
        "__all__", "all_finite", "field_of", "losses_at", "select",
    },
    "optim/_missed.py": {"init", "misses"},  # of an array of a fixed size, JAX says which pairs are there
    "optim/_recycled.py": {"_Search"},  # a loop of one program in JAX looks at the start as at a proposal
    "optim/_rate.py": {"not_worse", "paired_difference"},  # JAX says which pairs of an array of a fixed size are there
    "optim/_ivon.py": {
        # tensors are written in place, and a part of a network is several of them
        "__all__", "Prior.known", "State", "as_tensor", "at_most", "average", "debias", "divergence_of_loc",
        "divergence_of_scale", "echo", "init", "kl_divergence", "offset_from",
        "residual", "stacks", "step", "surrogate", "there", "weighted_square", "Shapes",
    },
    "optim/ivon.py": {
        # the optimizer's interface, which is the host's, and how the host runs on several devices
        "IVON.__init__", "IVON.init", "IVON.eval_and_update", "IVON.eval_and_stable_update", "IVON.get_params",
        "IVON.get_state", "IVON.set_state", "IVONState", "IVONState.covers", "Statistics",
    },
    "optim/blr.py": {
        # the optimizer's interface, which is the host's, and the state that the host carries or lets it carry
        "BLR.init", "BLR.eval_and_update", "BLR.eval_and_stable_update", "BLR.get_params", "BLR.get_state",
        "BLR.set_state", "OptState", "OptState.step_seed",
        "BLR.advance", "BLR.traced_reason",  # a step on the traced loss, without the host's own evaluation
    },
}  # fmt: skip
# JAX compiles, traces by itself, has arrays of a fixed size, a state that pickles; NumPyro lifts modules; torch has
# fast noise
ALONE = {
    "numpyro_blr": {"compiling.py", "draws.py", "gradients/_paged.py", "optim/_noise.py"},
    "pyro_blr": {
        "guides/bayesian_module.py",
        "optim/_graph.py",
        "optim/_rewriting.py",
        "optim/_saved.py",
        "optim/_traced.py",
    },
}
COMMON = {
    "optim/_weights.py": {"LogDensity", "LogDensity.log_prob", "Perturb", "check_layout", "survey"},
    "optim/_svi.py": {
        "Members", "Redraw", "Redraw.weight", "calling_svi", "check_loss", "check_params", "frame_of", "host_optimizer",
        "objective_of", "report_skipped", "standard_normal",
    },
    "optim/_layout.py": {
        "JOINT", "Layout", "Layout.bare", "Layout.blocks", "Member", "Site", "Site.bare", "gather", "gather_members",
        "has_family", "joined", "plates_of", "rows_of", "scatter", "scatter_members", "subsampled", "unwrap",
    },
    "optim/_recognition.py": {"WANTED", "recognise"},
}  # fmt: skip


def outline(path: Path) -> dict[str, list[str]]:
    """Public functions, classes with their fields, methods, constants and `__all__` of a module, with parameters."""
    found: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                arguments = node.args
                names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
                names += [f"{argument.arg}=" for argument in arguments.kwonlyargs]
                names += [f"*{star.arg}" for star in (arguments.vararg, arguments.kwarg) if star]
                found[prefix + node.name] = [name for name in names if name not in OPTIONS]
            elif isinstance(node, ast.ClassDef):
                fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                found[prefix + node.name] = fields
                visit(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(path.read_text())
    visit(tree.body, "")
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            found["__all__"] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "_")[0].isupper():
            found[ast.unparse(node.targets[0])] = []
    return found


def run_isolated(code: str, *blocked: str) -> None:
    """Python that ends with `code`, where importing one of `blocked` fails as if it were not installed."""
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    ran = subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def needs(package: str) -> None:
    missing = [name for name in FRAMEWORKS[package] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def test_the_packages_have_the_same_files():
    for package in PACKAGES:
        (other,) = set(PACKAGES) - {package}
        assert FILES[package] - FILES[other] == ALONE[package]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in COMMON])
def test_the_modules_have_the_same_outline(module):
    numpyro, pyro = (outline(ROOT / name / module) for name in PACKAGES)
    different = {name for name in numpyro.keys() | pyro.keys() if numpyro.get(name) != pyro.get(name)}
    expected = DIFFERENCES.get(module, set())
    assert different == expected, {name: (numpyro.get(name), pyro.get(name)) for name in different ^ expected}


@pytest.mark.parametrize("module", COMMON)
def test_the_modules_that_know_the_host_have_the_same_names_for_the_same_things(module):
    for package in PACKAGES:
        assert outline(ROOT / package / module).keys() >= COMMON[module]


@pytest.mark.parametrize("module", MODULES)
def test_the_modules_say_the_same_in_their_first_line(module):
    """The docstrings are the same text as far as the host allows; their first line is the file's subject."""
    lines = [ast.get_docstring(ast.parse((ROOT / name / module).read_text())).partition("\n")[0] for name in PACKAGES]
    assert lines[0].replace("NumPyro", "Pyro") == lines[1].replace("NumPyro", "Pyro")


FITS = {
    "numpyro_blr": """
import jax, numpyro, numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro_blr import BLR
def model(): numpyro.sample('z', dist.Normal(2.0, 1.0))
guide = AutoNormal(model)
params = SVI(model, guide, BLR(), Trace_ELBO()).run(jax.random.key(0), 1, progress_bar=False).params
assert abs(params['z_auto_loc'] - 2) < 1e-5
""",
    "pyro_blr": """
import pyro, pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro_blr import BLR
def model(): pyro.sample('z', dist.Normal(2.0, 1.0))
pyro.set_rng_seed(0)  # once in 400 a pair of draws beyond three standard deviations has the rate cut
guide = AutoNormal(model)
SVI(model, guide, BLR(), Trace_ELBO()).step()
assert abs(guide.median()['z'] - 2) < 1e-5
""",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_works_where_the_other_framework_is_not_installed(package):
    """And in single precision, the hosts' default."""
    needs(package)
    (other,) = set(PACKAGES) - {package}
    run_isolated(FITS[package], *FRAMEWORKS[other], other)


IMPORTS = {
    "numpyro_blr": """
import jax, numpyro_blr
assert not jax.live_arrays(), jax.live_arrays()
assert not jax.config.jax_enable_x64
""",
    "pyro_blr": """
import gc, torch, pyro.infer, pyro.infer.autoguide, pyro.optim
before = {id(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
random_state = torch.get_rng_state()
import pyro_blr
made = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing is not random_state]
assert not {id(thing) for thing in made} - before
assert torch.equal(torch.get_rng_state(), random_state)
assert torch.get_default_dtype() == torch.float32
""",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_makes_no_arrays_changes_no_setting_and_invites_no_other_framework(package):
    needs(package)
    (other,) = set(PACKAGES) - {package}
    foreign = {*FRAMEWORKS[other], other}
    run_isolated(f"{IMPORTS[package]}\nassert not {foreign!r} & sys.modules.keys(), 'imported uninvited'")


def test_the_options_are_the_same_text():
    first, second = ((ROOT / name / "optim/_options.py").read_bytes() for name in PACKAGES)
    assert first == second


def constants(path: Path) -> dict[str, str]:
    """The public constants of a module that are written out as literals."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).lstrip("(")[0].isupper()
        if named and all(isinstance(part, (ast.Constant, ast.Tuple, ast.Load)) for part in ast.walk(node.value)):
            found[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    return found


def test_the_constants_have_the_same_values():
    """Those of the modules that know the host as far as both have them."""
    numpyro, pyro = ({module: constants(ROOT / name / module) for module in MODULES} for name in PACKAGES)
    for module in COMMON:
        shared = numpyro[module].keys() & pyro[module].keys()
        numpyro[module], pyro[module] = ({name: found[module][name] for name in shared} for found in (numpyro, pyro))
    assert numpyro == pyro
    assert {"optim/_rate.py", "optim/blr.py"} <= {module for module, found in pyro.items() if found}


LAYERS = ("families", "gradients", "optim")


def imported(package: str, module: str) -> list[str]:
    """The absolute names of everything that a module imports."""
    here, found = [package, *Path(module).parts[:-1]], []
    for node in ast.walk(ast.parse((ROOT / package / module).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            found += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    """families ← gradients ← optim."""
    arrows = set()
    for module in FILES[package]:
        layer = Path(module).parts[0]
        inside = [name.split(".")[1] for name in imported(package, module) if name.split(".")[0] == package]
        if layer in LAYERS:
            arrows |= {(layer, other) for other in inside}
    assert all(LAYERS.index(other) <= LAYERS.index(layer) for layer, other in arrows)
    assert {("gradients", "families"), ("optim", "families"), ("optim", "gradients")} <= arrows


@pytest.mark.parametrize("package", PACKAGES)
def test_families_and_gradients_are_arrays_in_and_arrays_out(package):
    """They know the framework and not the host, but that a family knows the host's distributions."""
    framework, host = FRAMEWORKS[package]
    for layer, known in (("families", {"distributions"}), ("gradients", set())):
        modules = [module for module in MODULES if Path(module).parts[0] == layer]
        names = [name.split(".") for module in modules for name in imported(package, module)]
        assert framework in {name[0] for name in names}
        assert {name[1] for name in names if name[0] == host} == known


DEVICES = {
    "numpyro_blr": "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()",
    "pyro_blr": "import torch\nassert not torch.cuda.is_initialized()",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_takes_no_device(package):
    needs(package)
    run_isolated(f"import {package}\n{DEVICES[package]}")

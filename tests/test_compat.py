"""Private names of NumPyro, and the replacements in `_compat`."""

import ast
from pathlib import Path

import jax
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal

import numpyro_ensemble
from numpyro_ensemble._compat import (
    HANDLERS,
    PROTOTYPES,
    check_plates,
    distribution_mask,
    hessian_of,
    latent_starts,
)

PRIVATE = {"blackjax", "jax", "jaxlib", "numpyro", "optax"}


def model():
    numpyro.sample("w", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.HalfNormal(1.0))


def test_handlers_around_a_call_are_in_the_list():
    scale = handlers.scale(scale=2.0)
    with scale:
        assert HANDLERS[-1] is scale
    assert not HANDLERS


def test_an_autoguide_keeps_its_starts_in_the_order_of_the_model():
    guide = AutoNormal(model)
    assert latent_starts(guide) == {}
    handlers.seed(guide, jax.random.key(0))()
    assert list(latent_starts(guide)) == ["w", "b"]
    assert [n for n, v in vars(guide).items() if n.startswith(PROTOTYPES) and isinstance(v, dict)]


def test_a_laplace_guide_keeps_its_hessian():
    def hessian(loss, point):
        return point

    assert hessian_of(AutoLaplaceApproximation(model, hessian_fn=hessian)) is hessian
    assert hessian_of(None)(lambda x: 3.0 * x**2, 1.0) == 6.0


def test_a_masked_distribution_tells_its_mask():
    assert distribution_mask(dist.Normal(0.0, 1.0).mask(False)) is False


def test_an_axis_without_a_plate_is_told():
    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    check_plates(trace)
    with handlers.seed(rng_seed=0), handlers.trace() as wide:
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]))
    with pytest.raises(ValueError, match="Missing a plate statement for batch dimension -1"):
        check_plates(wide)


FILES = sorted(Path(numpyro_ensemble.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "_compat.py"], ids=lambda f: f.stem)
def test_private_names_are_imported_nowhere_else(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PRIVATE:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [n for n in names if n.startswith("_")], names

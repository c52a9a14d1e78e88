"""The two parts of a log joint density, and the description of a model's sites."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from closed_forms import NAMES, normal, parts
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import log_density
from zoo import CASES, X, Y, chosen, ridge

from numpyro_ensemble import log_joint
from numpyro_ensemble.density import model_sites


def tolerance():
    return {"rtol": 1e-9} if jax.config.jax_enable_x64 else {"rtol": 1e-4, "atol": 1e-5}


def starts(model, args, kwargs):
    """Return a start for every latent and parameter."""
    filled = handlers.substitute(model, substitute_fn=init_to_uniform(radius=1.0))
    trace = handlers.trace(filled).get_trace(*args, **kwargs)
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    params = {n: s for n, s in trace.items() if s["type"] in ("param", "mutable")}
    return {name: site["value"] for name, site in {**latent, **params}.items()}


QUICK = {  # kinds of sites that `test_each_part_is_what_it_is_by_hand` leaves out
    "batch_norm", "correlation", "dependent_support", "hierarchy", "interval", "learned_centring",
    "local_latents", "nnx_net", "ordered", "random_flax_net", "simplex", "with_param",
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(sorted(CASES), QUICK))
def test_the_parts_add_up_to_the_log_density(name, key):
    model, args, kwargs = CASES[name]

    @jax.jit
    def both(rng_key):
        seeded = handlers.seed(model, rng_key)
        params = starts(seeded, args, kwargs)
        split = log_joint(handlers.seed(model, rng_key))(params, *args, **kwargs)
        whole = log_density(handlers.seed(model, rng_key), args, kwargs, params)[0]
        return split, whole

    (log_likelihood, log_prior), whole = both(key)
    assert log_likelihood.shape == log_prior.shape == ()
    assert_allclose(log_likelihood + log_prior, whole, rtol=1e-12)
    assert min(abs(log_likelihood), abs(log_prior)) > 1e-2  # no part is 0


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_what_it_is_by_hand(name):
    model, args, params, likelihood, prior = parts(name)
    ours = jax.jit(lambda p: log_joint(model)(p, *args))(params)
    assert_allclose(ours, (likelihood, prior), **tolerance())
    assert abs(likelihood - prior) > 0.1  # swapped parts would be seen


def test_factors_are_likelihood_unless_they_are_named():
    model, args, params, likelihood, prior = parts("with_factor")
    moved = log_joint(model, prior_sites=["penalty"])(params, *args)
    penalty = -abs(params["mu"] - 0.3)
    assert_allclose(moved, (likelihood - penalty, prior + penalty), **tolerance())
    assert abs(penalty) > 0.1


def test_latents_without_a_value_are_named():
    joint = log_joint(ridge)
    with pytest.raises(ValueError, match=r"no value for the latent sites \['w'\]\. Give"):
        joint({}, X, Y)
    with numpyro.handlers.seed(rng_seed=0):  # with a key, missing latents are drawn
        assert jnp.isfinite(joint({}, X, Y)[0])


@pytest.mark.core
@pytest.mark.leaks
def test_the_parts_differentiate_and_vectorise():
    joint = log_joint(ridge)
    w = jnp.array([[0.3, -0.7], [1.0, 0.5], [0.0, 2.0]])

    @jax.jit
    @jax.vmap
    def gradients(w):
        return jax.jacrev(joint)({"w": w}, X, Y)

    by_likelihood, by_prior = (g["w"] for g in gradients(w))
    residuals = Y[:, None] - X @ np.asarray(w).T
    assert_allclose(by_likelihood, (X.T @ residuals / 0.25).T, **tolerance())
    assert_allclose(by_prior, -w / 4.0, **tolerance())


def test_a_handler_around_a_model_is_seen():
    model, args, params, likelihood, prior = parts("positive")
    halved = handlers.scale(model, scale=0.5)
    assert_allclose(log_joint(halved)(params, *args), (likelihood / 2, prior / 2), **tolerance())
    fixed = handlers.condition(model, {"rate": params["rate"]})
    rate = 2 * np.log(2.0) + np.log(params["rate"]) - 2.0 * params["rate"]  # Gamma(2, 2)
    rest = {name: params[name] for name in ("scale", "loc")}
    expected = (likelihood + rate, prior - rate)  # a conditioned site is likelihood
    assert_allclose(log_joint(fixed)(rest, *args), expected, **tolerance())


def of_every_kind(x, y=None):
    scale = numpyro.param("scale", jnp.ones(()))
    free = numpyro.sample("free", dist.ImproperUniform(dist.constraints.real, (), (3,)))
    total = numpyro.sample("total", dist.Poisson(3.0))
    state = numpyro.primitives.mutable("state", {"mean": jnp.zeros(3)})
    with numpyro.plate("rows", x.shape[0], dim=-2), numpyro.plate("columns", x.shape[1]):
        mean = numpyro.sample("mean", dist.Normal(free.sum() + state["mean"].sum(), scale))
        numpyro.sample("y", dist.Normal(mean + total, 1.0), obs=y)
    with numpyro.plate("groups", 4):
        numpyro.factor("bonus", jnp.ones(4))


@pytest.mark.leaks
def test_the_sites_of_a_model():
    sites = model_sites(of_every_kind, (np.ones((5, 2)),), {"y": np.ones((5, 2))})
    both = (("columns", 2), ("rows", 5))
    assert {k: (s.kind, s.role, s.shape, s.plates) for k, s in sites.items()} == {
        "scale": ("param", None, (), ()),
        "free": ("latent", "prior", (3,), ()),
        "total": ("discrete", "prior", (), ()),
        "state": ("mutable", None, {"mean": (3,)}, ()),
        "rows": ("plate", None, (5,), ()),
        "columns": ("plate", None, (2,), ()),
        "mean": ("latent", "prior", (5, 2), both),
        "y": ("observed", "likelihood", (5, 2), both),
        "groups": ("plate", None, (4,), ()),
        "bonus": ("factor", "likelihood", (4, 0), (("groups", 4),)),  # NumPyro's factor is empty
    }
    assert sites["mean"].distribution == "Normal"
    assert [site.name for site in sites.values()] == list(sites)
    unseen = model_sites(of_every_kind, (np.ones((5, 2)),), {}, prior_sites=["bonus"])
    assert (unseen["y"].kind, unseen["y"].role) == ("latent", "prior")
    assert unseen["bonus"].role == "prior"


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("circular", {"mu_unwrapped": "prior", "mu_factor": "prior", "y": "likelihood"}),
        ("partly_observed", {"mu": "prior", "y_observed": "likelihood", "y_unobserved": "prior"}),
        ("scoped", {"left/mu": "prior", "left/y": "likelihood", "right/s": "prior",
                    "right/y": "likelihood"}),
        ("random_nnx_net", {"net/bias": "prior", "net/kernel": "prior", "noise": "prior",
                            "y": "likelihood"}),
    ],
)  # fmt: skip
def test_roles_of_reparameterised_scoped_and_imputed_sites(name, roles):
    model, args, kwargs = CASES[name]
    sites = model_sites(model, args, kwargs)
    assert {k: s.role for k, s in sites.items() if s.role is not None} == roles


def test_model_sites_compiles_nothing(compile_count):
    x = np.ones((7, 3))  # shapes that no other test has compiled anything for
    y = np.ones(7)
    with compile_count() as count:
        sites = model_sites(ridge, (x, y), {})
    assert count.count == 0, count.names
    assert sites["w"].shape == (3,)
    with compile_count() as count:
        ours = log_joint(ridge)({"w": jnp.zeros(3)}, x, y)
    assert count.count > 0  # running the model compiles
    assert_allclose(ours, (normal(y, 0.0, 0.5), normal(np.zeros(3), 0.0, 2.0)), **tolerance())

"""Weights on prior and likelihood, checked against log densities written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from closed_forms import NAMES, normal, parts
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.reparam import CircularReparam, NeuTraReparam
from numpyro.infer.util import log_density, potential_energy
from scipy import integrate, stats
from zoo import CASES, X, Y, angle, ridge

from numpyro_ensemble import reweight


def tolerance():
    return {"rtol": 1e-9} if jax.config.jax_enable_x64 else {"rtol": 1e-4, "atol": 1e-5}


def density(model, params, *args):
    return log_density(model, args, {}, params)[0]


# Weights against hand computation ---------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_each_part_has_its_weight(name):
    model, args, params, likelihood, prior = parts(name)

    @jax.jit
    def weighted(params):
        """Return four densities of one model, in one program."""
        pairs = ((0.5, 3.0), (3.0, 0.5), (0, 1.0), (2.0, 0))
        return [density(reweight(model, prior=a, likelihood=b), params, *args) for a, b in pairs]

    expected = [
        0.5 * prior + 3.0 * likelihood,
        3.0 * prior + 0.5 * likelihood,
        likelihood,
        2.0 * prior,
    ]
    assert_allclose(weighted(params), expected, **tolerance())
    assert abs(expected[0] - expected[1]) > 0.1  # swapped weights would be seen


def test_handlers_inside_and_outside_multiply():
    model, args, params, likelihood, prior = parts("scaled_and_masked")
    inside = reweight(handlers.scale(model, scale=4.0), prior=0.5, likelihood=3.0)
    outside = handlers.scale(reweight(model, prior=0.5, likelihood=3.0), scale=4.0)
    twice = reweight(reweight(model, prior=0.5), prior=4.0, likelihood=3.0)
    expected = 4.0 * (0.5 * prior + 3.0 * likelihood)
    assert_allclose(density(inside, params, *args), expected, **tolerance())
    assert_allclose(density(outside, params, *args), expected, **tolerance())
    assert_allclose(density(twice, params, *args), 2.0 * prior + 3.0 * likelihood, **tolerance())


def test_a_condition_inside_is_likelihood_and_one_outside_is_not():
    model, args, params, likelihood, prior = parts("positive")
    rest = {name: params[name] for name in ("scale", "loc")}
    fixed = {"rate": params["rate"]}
    rate = stats.gamma.logpdf(params["rate"], 2.0, scale=0.5)
    inside = reweight(handlers.condition(model, fixed), prior=0.5, likelihood=3.0)
    outside = handlers.condition(reweight(model, prior=0.5, likelihood=3.0), fixed)
    within = 0.5 * (prior - rate) + 3.0 * (likelihood + rate)
    assert_allclose(density(inside, rest, *args), within, **tolerance())
    assert_allclose(density(outside, rest, *args), 0.5 * prior + 3.0 * likelihood, **tolerance())


# Jacobians --------------------------------------------------------------------------------------

ON_THE_REAL_LINE = {
    "positive": ["scale", "rate", "loc"],
    "scoped": ["right/s"],  # its factor is right/_right/s_log_det
    "decentred": ["tau"],
    "chain": ["v"],
}


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(ON_THE_REAL_LINE))
def test_jacobians_are_never_weighted(name):
    model, args, params, likelihood, prior = parts(name)
    logs = {k: np.log(params[k]) for k in ON_THE_REAL_LINE[name]}
    weighted = reweight(model, prior=0.5, likelihood=3.0)
    energy = jax.jit(lambda u: potential_energy(weighted, args, {}, u))({**params, **logs})
    log_det = sum(np.sum(u) for u in logs.values())
    expected = 0.5 * prior + 3.0 * likelihood + log_det
    assert_allclose(-energy, expected, **tolerance())
    naive = expected + 2.0 * log_det  # the Jacobian, an observed site, as likelihood
    assert abs(naive - expected) > 0.1


def test_the_jacobian_of_a_vector_is_not_weighted_either():
    case = CASES["simplex"]
    counts = np.bincount(case.args[0], minlength=3)
    sticks = {"p": jnp.array([0.3, -0.8])}
    p = np.asarray(dist.biject_to(dist.constraints.simplex)(sticks["p"]))
    likelihood, prior = (counts * np.log(p)).sum(), stats.dirichlet.logpdf(p, np.full(3, 2.0))

    @jax.jit
    def energies(sticks):
        weighted = reweight(case.model, prior=0.5, likelihood=3.0)
        models = (case.model, weighted)
        return [potential_energy(model, case.args, {}, sticks) for model in models]

    plain, weighted = energies(sticks)
    assert_allclose(plain - weighted, -0.5 * prior + 2.0 * likelihood, **tolerance())
    log_det = -plain - prior - likelihood
    assert abs(log_det) > 0.1  # a weighted Jacobian would be seen


@pytest.mark.core
def test_the_mean_of_a_tempered_half_normal():
    """The mean of a scale, under powers of prior and likelihood, is that by quadrature."""
    y, prior, likelihood = 1.5, 0.5, 3.0

    def model():
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, s), obs=y)

    def power(s):
        log_prior, log_likelihood = stats.halfnorm.logpdf(s), stats.norm.logpdf(y, 0.0, s)
        return np.exp(prior * log_prior + likelihood * log_likelihood)

    def mean(extra):
        top, bottom = (
            integrate.quad(lambda s, k=k: power(s) * s ** (k + extra), 0.0, np.inf)[0]
            for k in (1, 0)
        )
        return top / bottom

    weighted = reweight(model, prior=prior, likelihood=likelihood)
    grid = jnp.linspace(-5.0, 4.0, 2001)
    energy = jax.jit(jax.vmap(lambda u: potential_energy(weighted, (), {}, {"s": u})))(grid)
    mass = np.exp(-np.asarray(energy, np.float64))
    ours = (mass * np.exp(np.asarray(grid, np.float64))).sum() / mass.sum()
    close = 1e-7 if jax.config.jax_enable_x64 else 1e-5
    assert_allclose(ours, mean(extra=0.0), rtol=close)
    for weight in (prior, likelihood):  # the means if a weight were on the Jacobian
        assert abs(mean(extra=weight - 1.0) - ours) > 1000 * close


# Factors ----------------------------------------------------------------------------------------


def test_a_factor_is_likelihood_unless_it_is_named():
    model, args, params, likelihood, prior = parts("with_factor")
    penalty = -abs(params["mu"] - 0.3)
    weights = {"prior": 0.5, "likelihood": 3.0}
    plain = density(reweight(model, **weights), params, *args)
    named = density(reweight(model, **weights, prior_sites=["penalty"]), params, *args)
    assert_allclose(plain, 0.5 * prior + 3.0 * likelihood, **tolerance())
    assert_allclose(plain - named, 2.5 * penalty, **tolerance())


def test_the_factor_of_a_circular_site_is_prior_in_a_scope_too():
    def wrapped(y):
        with handlers.scope(prefix="in"):
            angle(y)
            numpyro.factor("user_factor", 0.7)  # without a site user_unwrapped, likelihood

    _, args, params, likelihood, prior = parts("circular")
    weights = {"prior": 0.5, "likelihood": 3.0}
    expected = 0.5 * prior + 3.0 * (likelihood + 0.7)
    inside = handlers.scope(handlers.reparam(angle, config={"mu": CircularReparam()}), prefix="in")
    within = density(
        reweight(inside, **weights), {"in/mu_unwrapped": params["mu_unwrapped"]}, *args
    )
    assert_allclose(within, expected - 3.0 * 0.7, **tolerance())
    outside = handlers.reparam(wrapped, config={"in/mu": CircularReparam()})
    latent = {"in/in/mu_unwrapped": params["mu_unwrapped"]}
    assert_allclose(density(reweight(outside, **weights), latent, *args), expected, **tolerance())
    naive = expected + 2.5 * prior  # the angle's prior, an observed site, as likelihood
    assert abs(naive - expected) > 0.1


def neutra(model, y):
    """Return a model reparameterised by an affine map, and the location and scale of the map."""
    guide = AutoDiagonalNormal(model)
    handlers.seed(guide, 0)(y)
    loc, scale = np.array([0.2, -0.1]), np.array([0.5, 2.0])
    params = {"auto_loc": jnp.asarray(loc), "auto_scale": jnp.asarray(scale)}
    return NeuTraReparam(guide, params).reparam(model), loc, scale


@pytest.mark.parametrize("scope", ["", "in/"])
def test_the_factors_of_neutra_are_prior_and_the_users_are_not(scope):
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.factor("bonus_log_prob", 0.7)
        numpyro.sample("y", dist.Normal(mu, s).expand([8]).to_event(1), obs=y)

    scoped = handlers.scope(model, prefix="in") if scope else model
    warped, loc, scale = neutra(scoped, Y)
    z = np.array([0.3, -0.4])
    mu, log_s = loc + scale * z
    s = np.exp(log_s)
    prior = normal(mu) + stats.halfnorm.logpdf(s) + log_s + np.log(scale).sum()
    likelihood = 0.7 + normal(Y, mu, s)
    weighted = reweight(warped, prior=0.5, likelihood=3.0)
    expected = 0.5 * prior + 3.0 * likelihood
    ours = density(weighted, {f"{scope}auto_shared_latent": z}, Y)
    assert_allclose(ours, expected, **tolerance())
    assert abs(2.5 * prior) > 0.1  # the error if it counted as likelihood


@pytest.mark.parametrize("name", ["mine_factor", "_mine_log_prob", "a_a_log_det", "x_log_det"])
def test_a_users_factor_with_such_a_name_is_likelihood(name):
    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.factor(name, -(mu**2))

    ours = density(reweight(model, prior=0.5, likelihood=3.0), {"mu": 0.8})
    assert_allclose(ours, 0.5 * normal(0.8) - 3.0 * 0.64, **tolerance())


# Zero, one and traced weights ---------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.leaks
def test_a_python_zero_masks_exactly_and_a_traced_one_only_multiplies():
    def model():
        s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))  # -inf at 0, NaN below
        numpyro.factor("score", -jnp.square(s - 1.0))

    @jax.jit
    @jax.vmap
    def masked(s):
        return jax.value_and_grad(lambda s: density(reweight(model, prior=0), {"s": s}))(s)

    values, slopes = masked(jnp.array([0.0, -1.0]))
    assert list(values) == [-1.0, -4.0]
    assert list(slopes) == [2.0, 4.0]

    def traced(s, w):
        return jax.grad(lambda s: density(reweight(model, prior=w), {"s": s}))(s)

    assert np.isnan(jax.jit(traced)(-1.0, 0.0))


def test_zero_drops_a_likelihood_that_is_not_a_number():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.factor("score", jnp.log(-jnp.square(mu)))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    @jax.jit
    def both(mu, y):
        masked = jax.value_and_grad(
            lambda mu: density(reweight(model, likelihood=0), {"mu": mu}, y)
        )
        return masked(mu), density(model, {"mu": mu}, y)

    (value, slope), whole = both(0.5, np.nan)
    assert_allclose(value, normal(0.5), **tolerance())
    assert slope == -0.5
    assert np.isnan(whole)


@pytest.mark.core
@pytest.mark.leaks
def test_traced_weights_multiply_and_differentiate():
    model, args, params, likelihood, prior = parts("ridge")

    def weighted(a, b):
        return density(reweight(model, prior=a, likelihood=b), params, *args)

    value, slopes = jax.jit(jax.value_and_grad(weighted, (0, 1)))(0.5, 3.0)
    assert_allclose(value, 0.5 * prior + 3.0 * likelihood, **tolerance())
    assert_allclose(slopes, (prior, likelihood), **tolerance())
    several = jax.jit(jax.vmap(weighted))(jnp.array([1.0, 0.5]), jnp.array([2.0, 3.0]))
    expected = [prior + 2.0 * likelihood, 0.5 * prior + 3.0 * likelihood]
    assert_allclose(several, expected, **tolerance())


@pytest.mark.parametrize("one", [1, 1.0, True, np.float32(1), jnp.ones(())])
def test_a_weight_of_one_leaves_messages_untouched(one):
    model, args, params, *_ = parts("scaled_and_masked")
    wrapped = reweight(model, prior=one, likelihood=one)

    def trace(model):
        return handlers.trace(handlers.substitute(model, params)).get_trace(*args)

    ours, theirs = trace(wrapped), trace(model)
    assert ours.keys() == theirs.keys()
    for name, site in theirs.items():
        assert ours[name].keys() == site.keys()
        assert type(ours[name]["fn"]) is type(site["fn"])
        assert ours[name].get("scale") == site.get("scale")
    assert ours["w"]["scale"] is None
    assert density(wrapped, params, *args) == density(model, params, *args)
    halved = trace(reweight(model, prior=0.5))
    assert halved["w"]["scale"] == 0.5


# Use ----------------------------------------------------------------------------------------------


def test_it_is_a_context_manager_and_leaves_no_trace_of_a_call():
    model, args, params, likelihood, prior = parts("circular")
    handler = reweight(model, prior=0.5, likelihood=3.0)
    before = {name: repr(value) for name, value in vars(handler).items()}
    expected = 0.5 * prior + 3.0 * likelihood
    for _ in range(2):
        assert_allclose(density(handler, params, *args), expected, **tolerance())
    assert {name: repr(value) for name, value in vars(handler).items()} == before
    with reweight(prior=0.5, likelihood=3.0):
        assert_allclose(density(model, params, *args), expected, **tolerance())
    assert_allclose(density(model, params, *args), prior + likelihood, **tolerance())


def test_a_call_does_not_remember_the_sites_of_the_one_before():
    def model(circular):
        if circular:
            numpyro.sample("a_unwrapped", dist.Normal(0.0, 1.0))
        numpyro.factor("a_factor", 0.7)

    handler = reweight(model, prior=0.5, likelihood=3.0)
    first = density(handler, {"a_unwrapped": 0.3}, True)
    assert_allclose(first, 0.5 * (normal(0.3) + 0.7), **tolerance())
    assert_allclose(density(handler, {}, False), 3.0 * 0.7, **tolerance())
    with pytest.raises(ZeroDivisionError), handler:
        numpyro.sample("a_unwrapped", dist.Normal(0.0, 1.0), rng_key=jax.random.key(0))
        raise ZeroDivisionError
    assert_allclose(density(handler, {}, False), 3.0 * 0.7, **tolerance())


@pytest.mark.parametrize("name", ["prior", "likelihood"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-1.0, ValueError, "finite weight of at least 0, got -1.0"),
        (jnp.float32(-2.0), ValueError, "finite weight of at least 0, got -2.0"),
        (np.nan, ValueError, "finite weight of at least 0, got nan"),
        (np.inf, ValueError, "finite weight of at least 0, got inf"),
        (np.ones(2), TypeError, "takes one number"),
        (jnp.ones(1), TypeError, "takes one number"),
        ("0.5", TypeError, "takes one number, got '0.5'"),
        (None, TypeError, "takes one number, got None"),
    ],
)
def test_weights_are_numbers(name, weight, error, message):
    with pytest.raises(error, match=f"^{name} takes .*{message.removeprefix('takes ')}"):
        reweight(ridge, **{name: weight})


def test_a_traced_weight_is_one_number_too():
    with pytest.raises(TypeError, match="^prior takes one number"):
        jax.jit(lambda w: density(reweight(ridge, prior=w), {"w": jnp.ones(2)}, X, Y))(jnp.ones(2))


def test_prior_sites_is_no_string():
    with pytest.raises(TypeError, match="prior_sites takes a collection of names.*'penalty'"):
        reweight(ridge, prior_sites="penalty")

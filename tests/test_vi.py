"""EnsembleVI against NumPyro's own SVI, and against closed forms."""

import copy
import pickle
from contextlib import nullcontext

import arviz as az
import jax
import jax.example_libraries.optimizers
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.funsor import config_enumerate
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from numpyro.infer.svi import SVIState
from zoo import (
    CASES,
    EQX,
    GROUP,
    NNX,
    Linen,
    X,
    Y,
    chosen,
    hierarchy,
    jit_once,
    local_latents,
    ridge,
)

from numpyro_ensemble import EnsembleVI, ensemble_vi, reweight

STEPS = 4
ADAM = numpyro.optim.Adam(0.05)


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: assert_allclose(a, b, **tolerance), ours, theirs)


def batched(y):
    with numpyro.plate("rows", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


def guide_list(model):
    guide = autoguide.AutoGuideList(model)
    seeded = handlers.seed(model, jax.random.key(3))
    guide.append(autoguide.AutoNormal(handlers.block(seeded, hide=["tau"])))
    guide.append(autoguide.AutoDelta(handlers.block(seeded, expose=["tau"])))
    return guide


def semi_dais_model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    return local_part(mu, y)


def local_part(mu, y):
    with numpyro.plate("data", 8, subsample_size=4):
        batch = numpyro.subsample(y, event_dim=0)
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=batch)


def semi_dais(model):
    def global_model(y):
        return numpyro.sample("mu", dist.Normal(0.0, 1.0))

    return autoguide.AutoSemiDAIS(
        model, lambda mu: local_part(mu, jnp.asarray(Y)), autoguide.AutoNormal(global_model)
    )


def surrogate_dais(model):
    return autoguide.AutoSurrogateLikelihoodDAIS(
        model, lambda: numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1)), K=2
    )


GUIDES = {
    "AutoNormal": (autoguide.AutoNormal, hierarchy, (GROUP, Y)),
    "AutoNormal, local latents": (autoguide.AutoNormal, local_latents, (Y,)),
    "AutoNormal, dependent support": (
        autoguide.AutoNormal, CASES["dependent_support"].model, (Y,),
    ),
    "AutoNormal, network": (autoguide.AutoNormal, CASES["batch_norm"].model, (X, Y)),
    "AutoDelta": (autoguide.AutoDelta, hierarchy, (GROUP, Y)),
    "AutoDelta, dependent support": (
        autoguide.AutoDelta, CASES["dependent_support"].model, (Y,),
    ),
    # jit(SVI.run) sorts the latents of joint guides; `test_order` has models of several latents
    "AutoDiagonalNormal": (autoguide.AutoDiagonalNormal, ridge, (X, Y)),
    "AutoMultivariateNormal": (autoguide.AutoMultivariateNormal, ridge, (X, Y)),
    "AutoLowRankMultivariateNormal": (autoguide.AutoLowRankMultivariateNormal, ridge, (X, Y)),
    "AutoLaplaceApproximation": (autoguide.AutoLaplaceApproximation, ridge, (X, Y)),
    "AutoBatchedMultivariateNormal": (
        lambda m: autoguide.AutoBatchedMultivariateNormal(m, batch_ndim=1),
        batched, (np.array([0.3, -0.2]),),
    ),
    "AutoBatchedLowRankMultivariateNormal": (
        lambda m: autoguide.AutoBatchedLowRankMultivariateNormal(m, batch_ndim=1),
        batched, (np.array([0.3, -0.2]),),
    ),
    "AutoIAFNormal": (
        lambda m: autoguide.AutoIAFNormal(m, num_flows=1, hidden_dims=[3]), ridge, (X, Y),
    ),
    "AutoBNAFNormal": (
        lambda m: autoguide.AutoBNAFNormal(m, num_flows=1, hidden_factors=[2]), ridge, (X, Y),
    ),
    "AutoDAIS": (lambda m: autoguide.AutoDAIS(m, K=2), ridge, (X, Y)),
    "AutoSemiDAIS": (semi_dais, semi_dais_model, (jnp.asarray(Y),)),
    "AutoSurrogateLikelihoodDAIS": (surrogate_dais, ridge, (X, Y)),
    "AutoGuideList": (guide_list, hierarchy, (GROUP, Y)),
}  # fmt: skip


QUICK = {"AutoNormal", "empty guide"}
# started under jit and vmap; the others are only traced so (AutoNormal has a test below)
TRANSFORMED = {"AutoLaplaceApproximation", "AutoBNAFNormal", "AutoGuideList"}


def tracers(value, met=None):
    """Find tracers in an object's attributes, containers and closures."""
    met = set() if met is None else met
    if id(value) in met:
        return []
    met.add(id(value))
    if isinstance(value, jax.core.Tracer):
        return [value]
    parts = []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif hasattr(value, "__closure__") and value.__closure__:
        parts = [cell.cell_contents for cell in value.__closure__]
    elif hasattr(value, "func"):
        parts = [value.func, value.args, value.keywords]
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("numpyro"):
        parts = list(vars(value).values())
    return [tracer for part in parts for tracer in tracers(part, met)]


def keeps_the_contract(runner, key, args, result, compile_count, transformed=True):
    """Run twice, run in two halves, and start under jit and vmap; `test_contract` does the rest."""
    with compile_count() as count:
        again = quiet(runner, key, STEPS, *args)
        first = quiet(runner, key, 1, *args)
    rest = quiet(runner, key, STEPS - 1, *args, init_state=first.state)
    assert count.count == 0, count.names
    assert_array_equal(again.losses, result.losses)
    assert_allclose(rest.losses, result.losses[:, 1:], rtol=1e-9)

    start = jit_once(jax.vmap(lambda k: runner.get_params(runner.init(k, *args))))
    if not transformed:  # tracing is enough to show leaks
        start.trace(key[None])
        return
    starts = start(key[None])
    alone = runner.get_params(runner.init(key, *args))
    close(jax.tree.map(lambda leaf: leaf[0], starts), alone, rtol=1e-5, atol=1e-7)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", chosen(GUIDES, QUICK))
def test_a_member_is_a_single_svi_for_every_autoguide(name, key, compile_count):
    build, model, args = GUIDES[name]
    guide = build(model)
    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    result = quiet(runner, key, STEPS, *args)
    assert tracers(guide) == []
    assert guide.prototype_trace is not None  # SVI.init sets guides up too

    svi = SVI(model, build(model), ADAM, Trace_ELBO())
    single = jit_once(lambda k: svi.run(k, STEPS, *args, progress_bar=False))
    alone = single(jax.random.split(key, 2)[1])
    assert_allclose(result.losses[1], alone.losses, rtol=1e-6)
    close(result.member(1).params, alone.params, rtol=1e-5, atol=1e-9)

    # from here on the guide is set up
    keeps_the_contract(runner, key, args, result, compile_count, name in TRANSFORMED)
    fresh = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    starts = fresh.get_params(fresh.init(jax.random.key(5), *args))
    different = [np.abs(leaf[0] - leaf[1]).max() for leaf in jax.tree.leaves(starts)]
    assert max(different) > 1e-3
    assert tracers(guide) == []
    draws = guide.sample_posterior(
        key, runner.get_params(result.state) and result.best().params, *args
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(draws))


def constant_guide(x, y):
    loc = numpyro.param("loc", jnp.zeros(2))
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    numpyro.sample("w", dist.Normal(loc, scale).to_event(1))


def random_guide(x, y):
    loc = numpyro.param("loc", lambda k: jax.random.normal(k, (2,)))
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    numpyro.sample("w", dist.Normal(loc, scale).to_event(1))


def amortised_model(x, y):
    with numpyro.plate("data", len(y), subsample_size=4):
        rows = numpyro.subsample(jnp.asarray(x), event_dim=1)
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=rows)


def amortised_by(encode):
    def guide(x, y):
        with numpyro.plate("data", len(y), subsample_size=4):
            rows = numpyro.subsample(jnp.asarray(x), event_dim=1)
            numpyro.sample("z", dist.Normal(encode(rows), 0.5))

    return guide


def linen_encoder(rows):
    return flax_module("encoder", Linen(), input_shape=(1, 2))(rows)


def nnx_encoder(rows):
    return nnx_module("encoder", NNX)(rows)[..., 0]


def equinox_encoder(rows):
    return jax.vmap(eqx_module("encoder", EQX))(rows)


def likelihood_only(x, y):
    w = numpyro.param("w", lambda k: jax.random.normal(k, (2,)))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def enumerated(x, y):
    mu = numpyro.sample("mu", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("y", dist.Normal(jnp.where(z == 1, mu[1], mu[0]), 1.0), obs=y)


def enumerated_guide(x, y):
    loc = numpyro.param("loc", lambda k: jax.random.normal(k, (2,)))
    numpyro.sample("mu", dist.Normal(loc, 0.3).to_event(1))


def discrete_model(x, y):
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    numpyro.sample("y", dist.Normal(z.astype(float), 1.0).expand([8]).to_event(1), obs=y)


def discrete_guide(x, y):
    numpyro.sample(
        "z", dist.Bernoulli(logits=numpyro.param("logit", lambda k: jax.random.normal(k)))
    )


def multi_sample_guide(x, y):
    loc = numpyro.param("loc", lambda k: jax.random.normal(k, (2,)))
    numpyro.sample("w", dist.Normal(loc, 0.5).expand([3, 2]).to_event(1), infer={})


PAIRS = {
    "constant param": (ridge, constant_guide, Trace_ELBO(), ADAM),
    "callable param": (ridge, random_guide, Trace_ELBO(num_particles=3), ADAM),
    "particles in a loop": (
        ridge, random_guide, Trace_ELBO(num_particles=2, vectorize_particles=False), ADAM,
    ),
    "particles by a callable": (
        ridge, random_guide,
        Trace_ELBO(num_particles=2, vectorize_particles=lambda f, keys: jax.vmap(f)(keys)), ADAM,
    ),
    "multi-sample guide": (ridge, multi_sample_guide, Trace_ELBO(multi_sample_guide=True), ADAM),
    "mean field": (ridge, random_guide, TraceMeanField_ELBO(), optax.adam(0.05)),
    "Renyi": (
        ridge, random_guide, RenyiELBO(alpha=0.5, num_particles=3), numpyro.optim.Adagrad(0.05),
    ),
    "graph": (ridge, random_guide, TraceGraph_ELBO(), numpyro.optim.RMSProp(0.01)),
    "graph, score gradients": (discrete_model, discrete_guide, TraceGraph_ELBO(), ADAM),
    "enumeration": (
        config_enumerate(enumerated), enumerated_guide, TraceEnum_ELBO(max_plate_nesting=1), ADAM,
    ),
    "amortised": (
        amortised_model, amortised_by(linen_encoder), Trace_ELBO(),
        numpyro.optim.Momentum(1e-3, 0.9),
    ),
    "amortised by NNX": (
        amortised_model, amortised_by(nnx_encoder), Trace_ELBO(), ADAM,
    ),
    "amortised by Equinox": (
        amortised_model, amortised_by(equinox_encoder), Trace_ELBO(), ADAM,
    ),
    "empty guide": (
        likelihood_only, lambda *a, **k: None, Trace_ELBO(), numpyro.optim.ClippedAdam(0.05),
    ),
}  # fmt: skip


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", chosen(PAIRS, QUICK))
def test_a_member_is_a_single_svi_for_guides_and_losses(name, key, compile_count):
    model, guide, loss, optim = PAIRS[name]
    runner = EnsembleVI(model, guide, optim, loss, ensemble_size=2)
    alike = any(part in name for part in ("constant", "NNX", "Equinox"))  # these have start values
    with pytest.warns(UserWarning, match="start at the same") if alike else nullcontext():
        result = quiet(runner, key, STEPS, X, Y)
    svi = SVI(model, guide, optim, loss)
    single = jit_once(lambda k: svi.run(k, STEPS, X, Y, progress_bar=False))
    alone = single(jax.random.split(key, 2)[1])
    assert_allclose(result.losses[1], alone.losses, rtol=1e-6)
    close(result.member(1).params, alone.params, rtol=1e-5)
    state = result.state
    value = runner.evaluate(state, X, Y)
    assert_allclose(value[1], svi.evaluate(alone.state, X, Y), rtol=1e-6)
    if not alike:
        keeps_the_contract(runner, key, (X, Y), result, compile_count, transformed=False)


OPTIMISERS = {
    "SGD": numpyro.optim.SGD(0.01),
    "Momentum": numpyro.optim.Momentum(0.01, 0.9),
    "Adagrad": numpyro.optim.Adagrad(0.05),
    "RMSPropMomentum": numpyro.optim.RMSPropMomentum(0.01),
    "optax chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 4)),
    ),
    "schedule": numpyro.optim.Adam(lambda step: 0.1 / (1 + step)),
    "example library": jax.example_libraries.optimizers.nesterov(0.01, 0.9),
}


@pytest.mark.parametrize("name", chosen(OPTIMISERS, set()))
def test_every_optimiser_walks_as_under_svi(name, key):
    optim = OPTIMISERS[name]
    runner = EnsembleVI(ridge, random_guide, optim, Trace_ELBO(), ensemble_size=2)
    result = quiet(runner, key, STEPS, X, Y)
    svi = SVI(ridge, random_guide, optim, Trace_ELBO())
    single = jit_once(lambda k: svi.run(k, STEPS, X, Y, progress_bar=False))
    alone = single(jax.random.split(key, 2)[1])
    assert_allclose(result.losses[1], alone.losses, rtol=1e-6)
    close(result.member(1).params, alone.params, rtol=1e-5)


@pytest.mark.long
@pytest.mark.leaks
def test_no_call_depends_on_what_was_called_on_the_guide_before(key):
    guide = autoguide.AutoNormal(ridge)
    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    jax.jit(lambda k: runner.init(k, X, Y).optim_state)(key)
    assert guide.prototype_trace is None  # a transformation leaves the guide as it was
    first = runner.get_params(runner.init(key, X, Y))
    assert guide.prototype_trace is not None
    held = copy.copy(vars(guide))
    jitted = jit_once(lambda k: runner.get_params(runner.init(k, X, Y)))(key)
    mapped = jax.vmap(lambda k: runner.get_params(runner.init(k, X, Y)))(key[None])
    close(jitted, first, rtol=1e-6)
    close(jax.tree.map(lambda leaf: leaf[0], mapped), first, rtol=1e-6)
    assert np.abs(first["w_auto_loc"][0] - first["w_auto_loc"][1]).max() > 1e-3
    assert all(vars(guide)[name] is value for name, value in held.items())
    other = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    close(other.get_params(other.init(key, X, Y)), first, rtol=0)
    # under a plain vmap of SVI, a guide that was set up gives every member the same start
    svi = SVI(ridge, guide, ADAM, Trace_ELBO())
    naive = jax.vmap(lambda k: svi.get_params(svi.init(k, X, Y)))(jax.random.split(key, 2))
    assert_array_equal(naive["w_auto_loc"][0], naive["w_auto_loc"][1])


@pytest.mark.long
def test_constraints_that_stem_from_a_start_are_not_mixed_up(key):
    model, y = CASES["dependent_support"].model, Y
    guide = autoguide.AutoDelta(model)
    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    first = quiet(runner, key, 3, y)
    close(runner.get_params(first.state), first.params, rtol=1e-9)
    more = quiet(runner, key, 3, y, init_state=first.state)
    quiet(runner, jax.random.key(8), 3, y)
    close(runner.get_params(first.state), first.params, rtol=1e-9)
    other = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    close(other.get_params(first.state), first.params, rtol=1e-9)
    close(quiet(other, key, 3, y, init_state=first.state).params, more.params, rtol=1e-9)
    plain = SVIState(*first.state)
    with pytest.raises(ValueError, match="plain SVIState.* constraints .* depend on where it"):
        quiet(other, key, 3, y, init_state=plain)
    alone = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=1)
    plain = SVIState(*alone.init(key, y))
    with pytest.raises(ValueError, match="plain SVIState.* constraints .* depend on where it"):
        alone.update(plain, y)


def test_another_loss_may_be_set(key):
    guide = autoguide.AutoNormal(ridge)
    runner = EnsembleVI(ridge, guide, ADAM, TraceMeanField_ELBO(), ensemble_size=2)
    state = runner.init(key, X, Y)
    analytic = runner.evaluate(state, X, Y)
    runner.loss = Trace_ELBO()
    other = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    assert_allclose(runner.evaluate(state, X, Y), other.evaluate(state, X, Y), rtol=1e-9)
    assert np.abs(runner.evaluate(state, X, Y) - analytic).min() > 1e-3


@pytest.mark.promotes_ranks
def test_code_written_against_svi_runs(key):
    guide = autoguide.AutoNormal(ridge)
    kwargs = {"init_params": {"w_auto_loc": jnp.array([0.3, -0.3])}, "stable_update": True}
    svi = SVI(ridge, guide, ADAM, Trace_ELBO())
    theirs = svi.run(key, 5, X, Y, progress_bar=False, **kwargs)
    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=1)
    ours = runner.run(key[None], 5, X, y=Y, progress_bar=False, **kwargs)
    assert ours._fields == theirs._fields
    close(ours.member(0).params, theirs.params, rtol=1e-9)
    assert_allclose(ours.losses[0], theirs.losses, rtol=1e-9)
    for name in ("model", "guide", "static_kwargs"):
        assert getattr(runner, name) == getattr(svi, name)
    assert type(runner.loss) is type(svi.loss) and type(runner.optim) is type(svi.optim)
    params, state, losses = ours
    forward = runner.update(state, X, Y, forward_mode_differentiation=True)[1]
    assert_allclose(forward, runner.update(state, X, Y)[1], rtol=1e-9)
    median = guide.median(ours.best().params)
    assert_allclose(median["w"], params["w_auto_loc"][0])
    drawn = Predictive(ridge, guide=guide, params=ours.member(0).params, num_samples=3)(
        key, X, None
    )
    assert drawn["y"].shape == (3, 8)
    assert guide.quantiles(ours.best().params, [0.1, 0.9])["w"].shape == (2, 2)


@pytest.mark.promotes_ranks
def test_a_member_goes_to_arviz(key):
    if not hasattr(az, "from_numpyro_svi"):  # ArviZ below 1.0 lacks it
        assert int(az.__version__.partition(".")[0]) < 1
        return
    guide = autoguide.AutoNormal(ridge)
    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    best = quiet(runner, key, 3, X, Y).best()
    single = SVI(ridge, guide, ADAM, Trace_ELBO())
    data = az.from_numpyro_svi(single, svi_result=best, model_args=(X, Y), num_samples=50)
    assert data.posterior["w"].shape == (50, 2)
    assert_allclose(data.posterior["w"].mean("sample"), best.params["w_auto_loc"], atol=0.1)


@pytest.mark.long
def test_sm3_runs_though_its_state_holds_shapes(key):
    optim = numpyro.optim.SM3(0.05)
    result = quiet(
        EnsembleVI(ridge, random_guide, optim, Trace_ELBO(), ensemble_size=2), key, 3, X, Y
    )
    svi = SVI(ridge, random_guide, optim, Trace_ELBO())  # SVI.run cannot carry this state

    @jit_once
    def three_steps(key):
        state, losses = svi.init(key, X, Y), []
        for _ in range(3):
            state, loss = svi.update(state, X, Y)
            losses.append(loss)
        return losses, svi.get_params(state)

    losses, params = three_steps(jax.random.split(key, 2)[1])
    assert_allclose(result.losses[1], losses, rtol=1e-9)
    close(result.member(1).params, params, rtol=1e-9)


@pytest.mark.long
def test_static_keywords_reach_model_and_guide(key):
    def model(y, scale=1.0):
        mu = numpyro.sample("mu", dist.Normal(0, scale))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([8]).to_event(1), obs=y)

    def build(cls, **options):
        return cls(model, autoguide.AutoNormal(model), ADAM, Trace_ELBO(), scale=3.0, **options)

    ours = quiet(build(EnsembleVI, ensemble_size=1), key[None], 3, Y)
    theirs = jit_once(lambda k: build(SVI).run(k, 3, Y, progress_bar=False).losses)(key)
    assert_allclose(ours.losses[0], theirs, rtol=1e-9)


# Closed forms -------------------------------------------------------------------------------------


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def tempered_posterior(y, weight):
    """Return the optimum of E log p(y | mu) - weight * KL: likelihood to the power 1 / weight."""
    precision = 1 / 4.0 + len(y) / (weight * 0.25)
    return y.sum() / (weight * 0.25) / precision, precision**-0.5


@pytest.mark.core
@pytest.mark.parametrize("weight", [1.0, 0.1, pytest.param(5.0, marks=pytest.mark.long)])
def test_the_tempered_optimum_is_its_closed_form(weight, key):
    guide = autoguide.AutoNormal(conjugate, init_scale=0.2)
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 2000))
    loss = TraceMeanField_ELBO(num_particles=8)
    runner = EnsembleVI(conjugate, guide, optim, loss, ensemble_size=2, kl_weight=weight)
    params = quiet(runner, key, 2000, Y).params
    mean, scale = tempered_posterior(Y, weight)
    assert_allclose(params["mu_auto_loc"], mean, atol=0.2 * scale)
    assert_allclose(params["mu_auto_scale"], scale, rtol=0.05)
    _, wrong = tempered_posterior(Y, 1.0 if weight != 1.0 else 2.0)
    assert abs(wrong / scale - 1) > 0.2


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(Trace_ELBO(), marks=pytest.mark.long),
        TraceMeanField_ELBO(),
        pytest.param(RenyiELBO(num_particles=2), marks=pytest.mark.long),
    ],
)
def test_weight_one_is_the_plain_elbo_bit_for_bit(loss, key):
    guide = autoguide.AutoNormal(ridge)
    plain = quiet(EnsembleVI(ridge, guide, ADAM, loss, ensemble_size=2), key, 3, X, Y)
    one = EnsembleVI(ridge, guide, ADAM, loss, ensemble_size=2, kl_weight=1)
    assert_array_equal(quiet(one, key, 3, X, Y).losses, plain.losses)


def test_a_schedule_weighs_each_step(key):
    guide = autoguide.AutoNormal(ridge)
    schedule = optax.linear_schedule(0.1, 1.0, 3)
    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2, kl_weight=schedule)
    first = quiet(runner, key, 2, X, Y)
    whole = quiet(runner, key, 5, X, Y)
    second = quiet(runner, key, 3, X, Y, init_state=first.state)
    assert_allclose(jnp.concatenate([first.losses, second.losses], 1), whole.losses, rtol=1e-9)
    for step, state in ((0, runner.init(key, X, Y)), (2, first.state)):
        weight = float(schedule(step))
        fixed = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2, kl_weight=weight)
        assert_allclose(whole.losses[:, step], fixed.evaluate(state, X, Y), rtol=1e-9)
    falling = optax.linear_schedule(0.1, -1.0, 3)
    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2, kl_weight=falling)
    with pytest.raises(ValueError, match="not negative; at step 1 it is -0.26"):
        quiet(runner, key, 3, X, Y)


def correlated():
    cov = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), cov))


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_full_rank_finds_a_correlation_that_mean_field_cannot(key):
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    loss = Trace_ELBO(num_particles=16)
    full = autoguide.AutoMultivariateNormal(correlated)
    tril = quiet(EnsembleVI(correlated, full, optim, loss, ensemble_size=2), key, 1500).params[
        "auto_scale_tril"
    ]
    covariance = np.einsum("eij,ekj->eik", tril, tril)
    assert_allclose(covariance, np.stack([[[1.0, 0.9], [0.9, 1.0]]] * 2), atol=0.05)
    diagonal = autoguide.AutoDiagonalNormal(correlated)
    scale = quiet(EnsembleVI(correlated, diagonal, optim, loss, ensemble_size=2), key, 1500).params[
        "auto_scale"
    ]
    # the sd given the other, not the marginal one
    assert_allclose(scale, np.sqrt(1 - 0.9**2), rtol=0.1)
    assert (np.abs(np.asarray(scale) - 1.0) > 0.3).all()


# Draws --------------------------------------------------------------------------------------------


def with_deterministic(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    nu = numpyro.sample("nu", dist.Normal(5.0, 1.0))
    numpyro.deterministic("total", mu + nu)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu + nu, 1.0), obs=y)


def hand_written(y):
    loc = numpyro.param("loc", lambda k: jax.random.normal(k))
    numpyro.sample("mu", dist.Normal(loc, 1e-6))
    numpyro.sample("nu", dist.Normal(2 * loc, 1e-6))


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_sample_posterior_draws_from_all_members(key):
    for guide in (autoguide.AutoNormal(with_deterministic), hand_written):
        runner = EnsembleVI(with_deterministic, guide, ADAM, Trace_ELBO(), ensemble_size=3)
        result = quiet(runner, key, 3, Y)
        grouped = runner.sample_posterior(key, result, Y, num_samples=5, group_by_member=True)
        assert {k: v.shape for k, v in grouped.items()} == dict.fromkeys(
            ("mu", "nu", "total"), (3, 5)
        )
        assert_allclose(grouped["total"], grouped["mu"] + grouped["nu"], rtol=1e-9)
        flat = runner.sample_posterior(key, result, Y, num_samples=5)
        assert_array_equal(flat["mu"], grouped["mu"].reshape(15))
    assert_allclose(grouped["mu"].mean(1), result.params["loc"], atol=1e-4)
    assert_allclose(grouped["nu"].mean(1), 2 * result.params["loc"], atol=1e-4)


@pytest.mark.promotes_ranks
def test_draws_see_the_data_of_their_member(key):
    """Guide and deterministic site of a member read its own rows and its own number."""

    def model(y, top, unit):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.deterministic("scaled", mu * unit + y.sum() + top["of"])
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y, top, unit):
        slope = numpyro.param("slope", 0.1)
        numpyro.sample("mu", dist.Normal(slope * y.mean() + 10 * unit, 1e-6))

    rows, units, top = np.stack([Y, 2 * Y, 3 * Y]), np.array([1.0, 0.0, 2.0]), {"of": 100.0}
    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=3)
    own = {"member_args": ["y", 2]}
    result = quiet(runner, key, 2, rows, top, units, **own)
    shape = {"num_samples": 5, "group_by_member": True}
    draws = runner.sample_posterior(key, result, rows, top, units, **shape, **own)
    slope, unit = np.asarray(result.params["slope"]), units[:, None]
    assert_allclose(
        draws["mu"], (slope * rows.mean(1))[:, None] + 10 * unit + 0 * draws["mu"], atol=1e-4
    )
    assert_allclose(draws["scaled"], draws["mu"] * unit + rows.sum(1)[:, None] + 100, rtol=1e-6)
    shared = runner.sample_posterior(key, result, rows[1], top, 0.0, **shape)
    assert_allclose(shared["mu"][1], draws["mu"][1], rtol=1e-9)
    assert_allclose(shared["scaled"] - rows[1].sum() - 100, 0, atol=1e-9)
    static = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=3, y=rows)
    named = {"top": top, "unit": units, "member_args": ["y", "unit"]}
    assert_allclose(static.sample_posterior(key, result, **named, **shape)["mu"], draws["mu"])
    with pytest.raises(
        ValueError, match=r"'y' has shape \(3, 8\), and in the fit it held the data"
    ):
        runner.sample_posterior(key, result, rows, top, 1.0)
    with pytest.raises(ValueError, match="'y' of shape .*leading length must be ensemble_size=3"):
        runner.sample_posterior(key, result, rows[:2], top, units, **own)


def test_models_that_read_values_draw_for_members(key):
    def model(y, flag, reads=False):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.deterministic("total", y.sum() if flag[0] > 0 else 0.0)
        if reads and y.sum() > 0:
            mu = 2 * mu
        numpyro.sample("y", dist.Normal(mu, jnp.ones(len(y))).to_event(1), obs=y)

    rows, flag = np.stack([Y, 2 * Y]), np.array([1.0])
    runner = EnsembleVI(model, autoguide.AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=2)
    result = quiet(runner, key, 2, rows, flag, member_args=["y"])
    draws = runner.sample_posterior(key, result, rows, flag, num_samples=3, member_args="y")
    assert_allclose(draws["total"], np.repeat(rows.sum(1), 3))
    with pytest.raises(
        ValueError, match="reads the values of an argument .*member_args traces 'y'"
    ):
        runner.sample_posterior(key, result, rows, flag, True, member_args="y")


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_blocked_autoguide_with_deterministic_sites_fits(key):
    blocked = handlers.block(handlers.seed(with_deterministic, jax.random.key(1)), hide=["nu"])
    guide = autoguide.AutoNormal(blocked)
    runner = EnsembleVI(with_deterministic, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        result = quiet(runner, key, 3, Y)
    draws = runner.sample_posterior(key, result, Y, num_samples=4)
    assert_allclose(draws["total"], draws["mu"] + draws["nu"], rtol=1e-9)
    assert np.ptp(draws["nu"]) > 0.1
    listed = autoguide.AutoGuideList(with_deterministic)
    listed.append(guide_part(with_deterministic, hide=["nu"]))
    listed.append(guide_part(with_deterministic, expose=["nu"]))
    with pytest.raises(ValueError, match="should not be exposed"):
        quiet(
            EnsembleVI(with_deterministic, listed, ADAM, Trace_ELBO(), ensemble_size=2), key, 3, Y
        )


def guide_part(model, **which):
    return autoguide.AutoNormal(handlers.block(handlers.seed(model, jax.random.key(1)), **which))


def test_ensemble_vi_fits_in_one_call(key):
    guide = autoguide.AutoNormal(conjugate)
    params, losses = ensemble_vi(
        conjugate, guide, ensemble_size=2, num_steps=30, data=(Y,), rng_key=key, learning_rate=0.1
    )
    assert losses.shape == (2, 30)
    assert params["mu_auto_loc"].shape == (2,)
    with pytest.raises(ValueError, match="either optimizer or learning_rate"):
        ensemble_vi(
            conjugate, guide, ensemble_size=2, num_steps=3, data=Y, rng_key=key,
            learning_rate=0.1, optimizer=ADAM,
        )  # fmt: skip


# Messages -----------------------------------------------------------------------------------------


def test_weights_are_refused_where_the_estimator_would_be_wrong(key):
    laplace = autoguide.AutoLaplaceApproximation(ridge)
    with pytest.raises(ValueError, match="AutoLaplaceApproximation.*Hessian.*reweight"):
        EnsembleVI(ridge, laplace, ADAM, Trace_ELBO(), kl_weight=0.5)
    model, guide, loss, _ = PAIRS["graph, score gradients"]
    with pytest.raises(ValueError, match="TraceGraph_ELBO and guide site 'z' .Bernoulli"):
        quiet(EnsembleVI(model, guide, ADAM, loss, kl_weight=0.5), key, 3, X, Y)
    model, guide, loss, _ = PAIRS["enumeration"]
    with pytest.raises(ValueError, match=r"TraceEnum_ELBO, which sums over \['z'\]"):
        quiet(EnsembleVI(model, guide, ADAM, loss, kl_weight=0.5), key, 3, X, Y)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="kl_weight takes a finite weight"):
            EnsembleVI(ridge, constant_guide, ADAM, Trace_ELBO(), kl_weight=bad)
    quiet(
        EnsembleVI(ridge, random_guide, ADAM, TraceGraph_ELBO(), kl_weight=0.5, ensemble_size=2),
        key, 2, X, Y,
    )  # fmt: skip


@pytest.mark.long
def test_why_the_score_term_refuses_a_weight(key):
    """The gradient of TraceGraph_ELBO under a weight is not that of the weighted bound."""
    weight = 0.3

    def bound(logit):
        """Return the weighted bound by summing over z."""
        q = jax.nn.sigmoid(logit)
        data = [dist.Normal(float(z), 1.0).log_prob(Y).sum() for z in (0, 1)]
        kl = q * jnp.log(q / 0.4) + (1 - q) * jnp.log((1 - q) / 0.6)
        return (1 - q) * data[0] + q * data[1] - weight * kl

    exact = -jax.grad(bound)(0.3)
    model, guide = (reweight(f, prior=weight, likelihood=w) for f, w in (
        (discrete_model, 1.0), (discrete_guide, weight)
    ))  # fmt: skip
    loss = TraceGraph_ELBO(num_particles=100_000)
    estimate = jax.grad(lambda logit: loss.loss(key, {"logit": logit}, model, guide, X, Y))(0.3)
    plain = jax.grad(
        lambda logit: loss.loss(key, {"logit": logit}, discrete_model, discrete_guide, X, Y)
    )(0.3)
    weight = 1.0
    assert_allclose(plain, -jax.grad(bound)(0.3), atol=0.1)  # correct without a weight
    assert abs(estimate - exact) > 0.3  # wrong with a weight


def test_discrete_sites_keep_numpyros_own_message(key):
    runner = EnsembleVI(discrete_model, discrete_guide, ADAM, Trace_ELBO(), ensemble_size=2)
    with pytest.warns(UserWarning, match="Trace_ELBO loss does not support models with discrete"):
        runner.init(key, X, Y)


def test_bad_input_names_argument_and_remedy(key):
    runner = EnsembleVI(ridge, random_guide, ADAM, Trace_ELBO(), ensemble_size=2)
    with pytest.raises(ValueError, match=r"init_params\['loc'\] has shape \(3, 2\).*\(2, 2\)"):
        quiet(runner, key, 3, X, Y, init_params={"loc": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"names \['lco'\]; the fit's parameters are \['loc'"):
        quiet(runner, key, 3, X, Y, init_params={"lco": np.ones(2)})
    with pytest.raises(TypeError, match="no option 'batch_size'.* It is an option of run"):
        EnsembleVI(ridge, random_guide, ADAM, Trace_ELBO(), batch_size=3)
    with pytest.raises(ValueError, match="static keywords .*'batch_size'.*functools.partial"):
        EnsembleVI(lambda x, batch_size: None, random_guide, ADAM, Trace_ELBO(), batch_size=3)
    with pytest.raises(TypeError, match="guide takes a callable"):
        EnsembleVI(ridge, None, ADAM, Trace_ELBO())
    with pytest.raises(TypeError, match="result takes what run returned, got dict"):
        runner.sample_posterior(key, {})


def test_batches_rescale_the_likelihood_alone(key):
    loss = TraceMeanField_ELBO()
    runner = EnsembleVI(ridge, random_guide, optax.sgd(1e-12), loss, ensemble_size=2)
    given = {"scale": np.full(2, 1e-9)}  # so narrow that draws are constant
    full = quiet(runner, key, 1, X, Y, init_params=given).losses[:, 0]
    batches = quiet(runner, key, 4, X, Y, batch_size=2, init_params=given).losses
    assert_allclose(batches.mean(1), full, rtol=1e-5)


def test_parameters_without_a_value_of_their_own(key):
    """As in SVI, such a parameter is shared with the guide, or given at the start."""

    def model():
        shared = numpyro.param("shared")
        numpyro.factor("loss", -((shared - numpyro.param("target")) ** 2))

    def guide():
        numpyro.param("shared", lambda k: jax.random.normal(k))

    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    with pytest.raises(ValueError, match="parameter 'target' has no initial value.*init_params"):
        runner.init(key)
    starts = {"target": 5.0}
    result = quiet(runner, key, 5, init_params=starts)
    alone = SVI(model, guide, ADAM, Trace_ELBO()).run(
        jax.random.split(key, 2)[1], 5, progress_bar=False, init_params=starts
    )
    assert_allclose(result.losses[1], alone.losses, rtol=1e-6)
    state, loss = runner.update(runner.init(key, init_params=starts))
    assert_allclose(loss, result.losses[:, 0], rtol=1e-9)
    made = quiet(runner, key, 5, init_params=lambda k: {"target": jnp.asarray(5.0)})
    assert_allclose(made.losses, result.losses, rtol=1e-9)
    with pytest.raises(ValueError, match="parameter 'target' has no initial value"):
        quiet(runner, key, 5)


@pytest.mark.long
def test_several_particles_leave_mutable_state_alone(key):
    def model():
        numpyro.sample("x", dist.Normal(-1, 1))

    def guide():
        loc = numpyro.param("loc", lambda k: jax.random.normal(k))
        held = numpyro.primitives.mutable("held", {"value": None})
        held["value"] = loc + 2.0
        numpyro.sample("x", dist.Normal(loc, 0.1))

    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(num_particles=2), ensemble_size=2)
    start = runner.init(key)
    with pytest.warns(UserWarning, match="mutable state is currently ignored"):
        result = quiet(runner, key, 3)
    assert_array_equal(
        result.state.mutable_state["held"]["value"], start.mutable_state["held"]["value"]
    )


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_step_with_other_data_is_a_step_of_the_same_fit(key):
    """As after `SVI.init`, later data change neither the guide nor the start's constraints."""

    def model(n, x):
        top = numpyro.sample("top", dist.Uniform(0.0, np.max(np.abs(x))))
        with numpyro.plate("n", n, subsample_size=x.size):
            numpyro.sample("x", dist.Normal(top, 1.0), obs=x)

    x = np.linspace(1.0, 2.0, 8)
    for build in (autoguide.AutoDelta, lambda m: autoguide.AutoDAIS(m, K=2)):
        runner = EnsembleVI(model, build(model), ADAM, Trace_ELBO(), ensemble_size=2, n=8)
        state = runner.init(key, x=x)
        svi = SVI(model, build(model), ADAM, Trace_ELBO(), n=8)
        alone = svi.init(jax.random.split(key, 2)[1], x=x)
        for part in (x[:4] + 1.0, x[4:] + 1.0):  # here another start would find a wider support
            state, loss = runner.update(state, x=part)
            alone, expected = svi.update(alone, x=part)
            assert_allclose(loss[1], expected, rtol=1e-9)
        close(jax.tree.map(lambda a: a[1], runner.get_params(state)), svi.get_params(alone))


def test_an_autoguide_inside_a_function_is_refused(key):
    inner = autoguide.AutoNormal(ridge)

    def guide(x, y):
        return inner(x, y)

    runner = EnsembleVI(ridge, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    with pytest.raises(ValueError, match="calls an AutoNormal that was not set up.*AutoGuideList"):
        runner.init(key, X, Y)
    assert inner.prototype_trace is None


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_result_knows_the_constraints_of_its_own_fit(key):
    def model(top, y):
        u = numpyro.sample("u", dist.Uniform(0.0, top))
        numpyro.sample("y", dist.Normal(u, 0.1), obs=y)

    runner = EnsembleVI(model, autoguide.AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=2)
    first = quiet(runner, key, 3, 1.0, 0.5)
    second = quiet(runner, key, 3, 100.0, 50.0)
    for result, top in ((first, 1.0), (second, 100.0)):
        draws = runner.sample_posterior(key, result, top, None, num_samples=20)["u"]
        assert 0.01 * top < draws.max() < top
    held = pickle.loads(pickle.dumps(first))
    assert_array_equal(held.losses, first.losses)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        runner.sample_posterior(key, first, 1.0, num_samples=0)
    other = EnsembleVI(model, autoguide.AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=3)
    with pytest.raises(ValueError, match="another ensemble size"):
        other.sample_posterior(key, first, 1.0)

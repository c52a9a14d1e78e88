"""Stochastic gradients of subsampled plates are unbiased, and the bias of the draws is small."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.sgmcmc import diffusions
from numpyro.infer import MCMC
from numpyro.infer.util import log_density, potential_energy

from numpyro_ensemble import Checkpoint
from numpyro_ensemble.mcmc import MCLMC, SGMCMC, minibatches, run_checkpointed
from numpyro_ensemble.mcmc.minibatches import MinibatchTarget, rows_at
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.sgmcmc_scheme import (
    Scheme,
    _gradient,
    _step,
    recentred,
    sgmcmc_start,
    thermal,
)

CHAINS, ROWS = 64, 400
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 3))
X[:, 1] += 2.0 * X[:, 0]  # correlated columns, and slopes of unequal scale
Y = X @ np.array([1.0, -0.5, 0.0]) + 0.3 + rng.normal(size=ROWS)


def regression(x, y, batch=20):
    """A vector before a scalar, in no alphabetical order, and a deterministic site of some rows."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    b = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * b)
    with numpyro.plate("data", len(y), subsample_size=batch) as rows:
        mean = numpyro.deterministic("mean", x[rows] @ w + b)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=numpyro.subsample(y, event_dim=0))


def posterior(x=X, y=Y):
    design = np.c_[x, np.ones(len(y))]
    covariance = np.linalg.inv(design.T @ design + np.eye(4))
    return covariance @ design.T @ y, covariance


def sampler(kernel, draws=100, warmup=100, **options):
    options = {"chain_method": "vectorized", "progress_bar": False, "num_chains": CHAINS} | options
    return MCMC(kernel, num_warmup=warmup, num_samples=draws, **options)


def start(seed=0, widths=2.0):
    """Return starts that are off by two standard deviations, with twice the posterior's width."""
    mean, covariance = posterior()
    factor = widths * np.linalg.cholesky(covariance)
    z = mean + (np.random.default_rng(seed).normal(size=(CHAINS, 4)) + 1.0) @ factor.T
    return {"w": jnp.asarray(z[:, :3]), "a": jnp.asarray(z[:, 3])}


def two_plates(counts, x, columns=2, rows=3):
    """Counts around an expectation, in two crossed plates that both take some rows."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    columns = numpyro.plate("columns", 3, subsample_size=columns, dim=-1)
    with numpyro.plate("rows", 4, subsample_size=rows, dim=-2) as i, columns as j:
        expected = rate[0] * jnp.exp(bias * x[i][:, j]) + rate[1]
        numpyro.sample("n", dist.Poisson(expected), obs=counts[i][:, j])


COUNTS = rng.poisson(2.0, size=(4, 3))


@pytest.mark.core
@pytest.mark.parametrize(("size", "number"), [(5, 2), (6, 3), (7, 3), (4, 4), (3, 1)])
def test_every_row_is_drawn_as_often(size, number):
    places = jnp.array(list(itertools.product(range(size), repeat=number)))
    rows = jax.vmap(lambda p: rows_at(p, size))(places)
    assert (np.bincount(rows.ravel(), minlength=size) * size == rows.size).all()
    assert (jnp.diff(rows, axis=1) >= 0).all()  # each row is from a later stratum
    if size % number == 0:
        assert (jnp.diff(rows, axis=1) > 0).all()


@pytest.mark.core
def test_rows_of_millions_do_not_overflow(key):
    rows = minibatches.drawn_rows(key, 2**30, 100_000)
    assert (jnp.diff(rows) >= 0).all() and rows[0] < 2**15 and 2**30 - 2**15 < rows[-1] < 2**30


@pytest.mark.long
def test_the_gradient_has_no_bias(monkeypatch):
    """The mean gradient over all draws of rows of both plates is the gradient of all rows."""
    data = jnp.asarray(COUNTS), jnp.asarray(rng.normal(size=(4, 3)))
    target = MinibatchTarget(two_plates, None, numpyro.infer.init_to_uniform)
    density = target.density_of_rows(data, {})
    z = {"rate": jnp.array([0.3, -0.2]), "bias": jnp.asarray(0.4)}
    kinds = [itertools.product(range(n), repeat=b) for n, b in ((4, 3), (3, 2))]
    places = [jnp.array(list(kind)) for kind in kinds]
    drawn = {}
    monkeypatch.setattr(minibatches, "drawn_rows", lambda key, size, _: rows_at(drawn[size], size))

    def of_rows(of_four, of_three):
        drawn.update({4: of_four, 3: of_three})
        return jax.value_and_grad(density)(z, jax.random.key(0))

    every = jax.vmap(jax.vmap(of_rows, (None, 0)), (0, None))
    found = jax.jit(every)(*places)
    expected = jax.jit(jax.value_and_grad(lambda z: density(z, None)))(z)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x.mean(axis=(0, 1)), y, rtol=1e-10),
        found,
        expected,
    )
    np.testing.assert_allclose(
        expected[0], -potential_energy(two_plates, (*data, 3, 4), {}, z), rtol=1e-10
    )
    # without the scale of rows, the error is large
    assert abs(found[0] - expected[0]).max() > 1.0 and found[0].shape == (64, 9)


def adaptation(density, rows, centre, weight):
    scheme = Scheme(metric="dense")
    a = sgmcmc_start(rows, jnp.zeros(len(rows)), Progress.start(9, len(rows)), scheme)
    wide = jnp.broadcast_to
    slope = jax.grad(density)(centre, None)
    return a._replace(
        step_size=a.step_size + 0.2,
        noise=a.noise + jnp.linspace(0.5, 3.0, rows.shape[1])[None],
        weight=a.weight + weight,
        centre=wide(centre, rows.shape),
        slope=wide(slope, rows.shape),
    )


def in_rows(batch=20):
    target = MinibatchTarget(regression, {"data": batch}, numpyro.infer.init_to_uniform)
    density = target.density_of_rows((jnp.asarray(X), jnp.asarray(Y)), {})
    return lambda row, key: density({"w": row[:3], "a": row[3]}, key)


@pytest.mark.long
def test_control_variates_change_no_mean_and_take_the_noise(key):
    density = in_rows()
    mean, covariance = map(jnp.asarray, posterior())
    rows = mean[None] + jax.random.normal(key, (CHAINS, 4)) @ jnp.linalg.cholesky(covariance).T

    @jax.jit
    def found(weights, keys):
        a = adaptation(density, rows, mean + 0.01, 0.0)
        full = a.metric.whiten_gradients(jax.grad(density)(rows[0], None))

        def moments(weight):
            gradient = _gradient(a._replace(weight=a.weight + weight), density)
            grads = jax.vmap(gradient, (None, 0))(rows[0], keys)[1]
            return grads.mean(axis=0) - full, grads.var(axis=0)

        return jax.vmap(moments)(weights)

    off, noise = found(jnp.array([0.0, 0.7, 1.0]), jax.random.split(key, 4000))
    assert (abs(off) < 4.5 * jnp.sqrt(noise / 4000)).all()
    plain, some, least = noise.mean(axis=1)
    assert abs(plain - ROWS / 20) < 7.0  # N / B in the posterior's scale
    assert least < 1.5 and least < some < plain


def test_a_start_on_some_rows_is_moved_to_all_of_them(key):
    """Narrow chains that are off by 30 scales end at the mode, as wide as before."""
    mean, covariance = posterior()
    factor = jnp.linalg.cholesky(jnp.asarray(covariance))
    rows = (mean + 30.0 * factor[:, 2])[None] + 0.3 * jax.random.normal(key, (CHAINS, 4)) @ factor.T
    search = jax.jit(lambda rows: recentred(rows, in_rows(), Scheme()))
    moved = search(rows)
    off = (moved.mean(axis=0) - mean) / np.sqrt(np.diag(covariance))
    assert abs(off).max() < 0.5
    np.testing.assert_allclose(moved - moved[:1], rows - rows[:1], atol=1e-10)
    assert jnp.isnan(search(rows.at[0, 0].set(jnp.nan))[0, 0])  # the search still ends


@pytest.mark.core
def test_the_step_is_blackjax(key):
    density = in_rows()
    mean, covariance = map(jnp.asarray, posterior())
    rows = mean[None] + jax.random.normal(key, (CHAINS, 4)) @ jnp.linalg.cholesky(covariance).T
    rows = rows.astype(mean.dtype)
    a = jax.jit(lambda rows: adaptation(density, rows, mean, 1.0))(rows)
    origin, momentum, xi = rows[3], jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.asarray(0.7)
    new = jax.jit(_step(a, density))(key, origin, jnp.zeros(4), momentum, xi)
    rows_key, noise_key = jax.random.split(key)
    sigma, turn, lam = a.metric.inverse_mass
    colour = jnp.diag(sigma) @ (jnp.eye(4) + turn @ jnp.diag(jnp.sqrt(lam) - 1.0) @ turn.T)
    there = origin + colour @ (0.2 * momentum)
    grad = jax.jit(jax.grad(density))
    known = grad(mean, rows_key) - grad(mean, None)
    temperature, alpha, beta = thermal(0.2, a.noise[0])
    state = jnp.zeros(4), momentum, xi, colour.T @ (grad(there, rows_key) - known)
    expected = diffusions.sgnht(alpha, beta)(noise_key, *state, 0.2, temperature)
    for ours, theirs in zip(new[:3], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(new[3], jax.jit(density)(there, rows_key), rtol=1e-3)


@pytest.mark.parametrize("step_size", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("noise", [0.0, 1.5, 3.0])
def test_a_normal_density_keeps_its_scale(step_size, noise):
    """The step of one coordinate is linear, so its stationary covariance is solved for."""
    temperature, alpha, beta = map(float, thermal(step_size, jnp.asarray(noise)))

    def scale(temperature, alpha, beta):
        added = step_size * temperature * (2 * alpha - step_size * temperature * beta)
        added += step_size**2 * noise
        move = np.array([[1.0, step_size], [-step_size, 1.0 - step_size - step_size**2]])
        noises = np.array([0.0, 0.0, 0.0, added])
        covariance = np.linalg.solve(np.eye(4) - np.kron(move, move), noises)
        return covariance[0], covariance[3]

    x, p = scale(temperature, alpha, beta)
    np.testing.assert_allclose([x, p], [1.0, temperature], rtol=1e-6)
    assert abs(scale(1.0, 1.0, noise)[0] - 1.0) > 0.9 * step_size**2 / 4
    if noise:  # the scale without a correction for the noise
        assert scale(temperature, alpha, 0.0)[0] - 1.0 > 0.4 * step_size * noise


@pytest.fixture(scope="module")
def fitted():
    mcmc = sampler(SGMCMC(regression))
    fields = ("adapt_state.xi", "adapt_state.noise", "adapt_state.weight", "num_steps")
    with jax.numpy_rank_promotion("raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc.run(jax.random.key(1), X, Y, init_params=start(), extra_fields=fields)
    return mcmc


def errors(mcmc, mean, covariance):
    """Return errors of means in standard deviations, and variances over true ones."""
    draws = mcmc.get_samples(group_by_chain=True)
    z = np.concatenate([draws["w"], draws["a"][..., None]], axis=-1)
    scale = np.sqrt(np.diag(covariance))
    return (z.mean(axis=(0, 1)) - mean) / scale, z.var(axis=(0, 1)) / scale**2


@pytest.mark.core
def test_draws_are_near_the_posterior(fitted):
    off, spread = errors(fitted, *posterior())
    assert abs(off).max() < 0.1 and abs(spread - 1.0).max() < 0.15
    # wrong: the posterior of 20 rows, from gradients without their scale
    few = errors(fitted, posterior()[0], ROWS / 20 * posterior()[1])
    assert abs(few[1] - 1.0).min() > 0.9
    draws = fitted.get_samples(group_by_chain=True)
    assert set(draws) == {"w", "a", "twice"}  # `mean`, which has rows, is left out
    assert draws["w"].shape == (CHAINS, 100, 3)
    fields = fitted.get_extra_fields(group_by_chain=True)
    assert abs(fields["adapt_state.xi"].mean() - 1.0) < 0.1
    assert fields["adapt_state.noise"].shape == (CHAINS, 100, 4)
    assert (fields["adapt_state.weight"] > 0.9).all() and (fields["num_steps"] == 8).all()
    assert not fields["diverging"].any()
    line = fitted.sampler.get_diagnostics_str(fitted.last_state)
    assert line.startswith("8 steps of size") and "gradient noise=" in line


@pytest.mark.long
def test_a_state_goes_on_with_other_data(fitted):
    """The gradient of all rows at the centre is computed for the data that a run is given."""
    last = fitted.post_warmup_state = fitted.last_state
    other = Y + 0.02
    fitted.run(last.rng_key, X, other)
    state = fitted.last_state
    assert (state.i == last.i + 100).all()
    off, spread = errors(fitted, *posterior(y=other))
    assert abs(off).max() < 0.15 and abs(spread - 1.0).max() < 0.2
    assert abs(errors(fitted, *posterior())[0][3]) > 0.3  # 0.02 is 0.4 standard deviations


@pytest.mark.core
def test_chains_draw_rows_of_their_own(fitted):
    """From equal states one step leads to equal positions, although chains draw different rows."""
    kernel = SGMCMC(regression, steps_per_draw=1)
    last = fitted.last_state
    alike = {"z": last.z, "r": last.r, "potential_energy": last.potential_energy}
    alike = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), alike)
    state = last._replace(rng_key=jax.random.split(jax.random.key(3), CHAINS), **alike)

    @jax.jit
    def step(state):
        return kernel.sample(state, (jnp.asarray(X), jnp.asarray(Y)), {})

    new = step(state)
    assert (abs(new.z["w"] - new.z["w"][:1]) < 1e-12).all()
    assert len(np.unique(new.potential_energy)) == CHAINS
    assert len(np.unique(new.r["a"])) == CHAINS
    # a chain that diverges does not affect the others
    bad = state._replace(z=state.z | {"a": state.z["a"].at[5].set(jnp.nan)})
    lost = step(bad)
    others = jnp.arange(CHAINS) != 5
    assert lost.diverging[5] and not lost.diverging[others].any()
    for name in ("w", "a"):
        np.testing.assert_array_equal(lost.z[name][others], new.z[name][others])
        np.testing.assert_array_equal(lost.r[name][others], new.r[name][others])


def test_rows_that_are_asked_for():
    z = {"w": jnp.array([0.3, -0.2, 1.0]), "a": jnp.asarray(0.4)}
    data = jnp.asarray(X), jnp.asarray(Y)

    def whole(x, y):
        return regression(x, y, batch=None)

    seeded = numpyro.handlers.seed(whole, jax.random.key(0))
    full = jax.jit(lambda z: log_density(seeded, data, {}, z)[0])(z)
    sizes = []

    def watched(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            rows, seen = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            sizes.append(len(seen))
            numpyro.sample("y", dist.Normal(rows @ w + a, 1.0), obs=seen)

    for model, asked, number in (
        (regression, 7, None), (regression, None, None), (watched, {"data": 9}, 9)
    ):  # fmt: skip
        kernel = SGMCMC(model, batch_size=asked)
        np.testing.assert_allclose(jax.jit(kernel.get_potential_fn(data))(z), -full, rtol=1e-6)
        density = jax.jit(kernel._rows.density_of_rows(data, {}))
        assert abs(density(z, jax.random.key(0)) - full) > 1.0
        if number:
            assert sizes[-1] == number
    # where the data of a plate are sorted, the rows of a stratum are alike
    ordered = np.sort(Y)
    flat = SGMCMC(regression, batch_size=100)._rows.density_of_rows((0.0 * X, ordered), {})
    values = jax.jit(jax.vmap(flat, (None, 0)))(z, jax.random.split(jax.random.key(0), 50))
    assert values.std() < 15.0  # 60 without strata


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The chains of SGMCMC have not mixed")
def test_runs_that_go_on_from_checkpoints(tmp_path):
    """The draws of one key are always the same, whether the run was made in pieces or not."""
    data, draws = (jnp.asarray(X), jnp.asarray(Y)), []
    for checkpoint in (None, Checkpoint(tmp_path, every=7)):
        mcmc = sampler(
            SGMCMC(regression, steps_per_draw=2), 20, 20, thinning=2, jit_model_args=True
        )
        if checkpoint is None:
            mcmc.run(jax.random.key(4), *data, init_params=start())
        else:
            run_checkpointed(mcmc, checkpoint, jax.random.key(4), *data, init_params=start())
        draws.append(mcmc.get_samples(group_by_chain=True))
    assert draws[0]["w"].shape == (CHAINS, 10, 3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8), *draws)


def test_what_is_refused():
    data = jnp.asarray(X), jnp.asarray(Y)
    keys = jax.random.split(jax.random.key(0), 8)

    def refused(message, model=regression, **options):
        with pytest.raises(ValueError, match=message):
            SGMCMC(model, **options).init(keys, 10, None, data)

    def local(x, y):
        with numpyro.plate("data", len(y), subsample_size=5) as rows:
            u = numpyro.sample("u", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(u, 1.0), obs=y[rows])

    def scoped(x, y):
        plate = numpyro.plate("data", len(y), subsample_size=5)
        with numpyro.handlers.scope(prefix="inner"), plate as rows:
            u = numpyro.sample("u", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(u, 1.0), obs=y[rows])

    def outside(x, y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        rows = numpyro.plate("data", len(y), subsample_size=5)._indices
        numpyro.sample("y", dist.Normal(m, 1.0).expand([5]).to_event(1), obs=y[rows])

    def mixed(x, y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=5) as rows:
            kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(m[kind], 1.0), obs=y[rows])

    def whole(x, y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def means(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=numpyro.subsample(y, event_dim=0))

    refused("latent site 'u' is in plate 'data', of which 5 of 400 rows are taken", local)
    refused(r"'y' depends on the rows that plates \['data'\] take, and is in none", outside)
    refused("latent site 'inner/u' is in plate 'data', of which 5", scoped)
    refused("latent site 'kind' is in plate 'data', of which 5", mixed)
    refused(
        r"no plate of the model takes some of its rows \(plates: \['data'\]\).*subsample", whole
    )
    refused(r"batch_size names \['rows'\], and the plates .* \['data'\]", batch_size={"rows": 3})
    refused("asks for 401 rows of plate 'data', which has 400", batch_size=401)
    refused("no plate of the model takes some", batch_size=400)
    for number in (1, 5):
        some = {"data": number}
        refused(f"data of all 400 rows in plate 'data', of which {number}", whole, batch_size=some)
    refused("cannot take the rows .*must follow the plate, by numpyro", means, batch_size=some)
    for value in (0.0, np.inf, 1.5):
        with pytest.raises(ValueError, match="step_size takes"):
            SGMCMC(regression, step_size=value)
    with pytest.raises(TypeError, match=r"batch_size\['data'\] takes an integer, got 2.5"):
        SGMCMC(regression, batch_size={"data": 2.5})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SGMCMC(regression, batch_size=0)
    with pytest.raises(TypeError, match="control_variates takes True or False, got 1"):
        SGMCMC(regression, control_variates=1)
    with pytest.raises(ValueError, match="one of model and potential_fn"):
        SGMCMC(None)
    with pytest.raises(ValueError, match="num_chains=2 is too few for SGMCMC"):
        SGMCMC(regression).init(keys[:2], 10, None, data)
    with pytest.raises(ValueError, match="given one alone"):
        SGMCMC(regression).init(keys[0], 10, None, data)
    with pytest.raises(ValueError, match="plate 'data' takes 20 of its 400 .*SGMCMC"):
        MCLMC(regression).init(keys, 10, None, data)

"""Fit a small Bayesian neural network to noisy data, many members at once.

The problem: 80 observations of sinc(x / pi) on [-10, 10] with noise 0.1, a 1-32-32-1 tanh network
with standard-normal priors, and 200 noisy test points on [-12, 12]. Each row of the table is an
ensemble of 16 fits after 1,500 steps of Adam, of MAP estimates or of mean-field variational
approximations. Rows differ in the members' starts, in the decay of the step size and in the weight
of the divergence from the prior. The oracle knows the function and the noise.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO, init_to_sample, init_to_uniform
from numpyro.infer.autoguide import AutoNormal
from overview import overview

from numpyro_ensemble import EnsembleMAP, EnsembleVI, ensemble_predict, plotting, scoring

NOISE = 0.1
WIDTHS = (1, 32, 32, 1)
MEMBERS, STEPS = 16, 1500


def truth(x):
    """Return sin(x) / x."""
    return np.sinc(x / np.pi)


def make_data(seed=666):
    """Return the training data and the noisy test data, the same in either precision."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.PRNGKey(seed), 3)
        x = np.asarray(jax.random.uniform(keys[0], (80,), minval=-10.0, maxval=10.0))
        x_test = np.linspace(-12.0, 12.0, 200)
        noise, noise_test = (
            NOISE * np.asarray(jax.random.normal(key, shape))
            for key, shape in zip(keys[1:], (x.shape, x_test.shape), strict=True)
        )
    return x, truth(x) + noise, x_test, truth(x_test) + noise_test


def network(weights, x):
    """Apply the network with the given weights to inputs (N,)."""
    hidden = x[:, None]
    for layer in range(len(WIDTHS) - 1):
        hidden = hidden @ weights[f"w{layer}"] + weights[f"b{layer}"][None]
        if layer < len(WIDTHS) - 2:
            hidden = jnp.tanh(hidden)
    return hidden[:, 0]


def model(x, y=None):
    """Put standard-normal priors on all weights and observe `y` with noise."""
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        prior = dist.Normal(0.0, 1.0)
        weights[f"w{layer}"] = numpyro.sample(
            f"w{layer}", prior.expand([fan_in, fan_out]).to_event(2)
        )
        weights[f"b{layer}"] = numpyro.sample(f"b{layer}", prior.expand([fan_out]).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(network(weights, x), NOISE), obs=y)


def small_start(key, scale=0.5):
    """Draw one member's start values, normal with the given scale."""
    starts = {}
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        key, key_w, key_b = jax.random.split(key, 3)
        starts[f"w{layer}"] = scale * jax.random.normal(key_w, (fan_in, fan_out))
        starts[f"b{layer}"] = scale * jax.random.normal(key_b, (fan_out,))
    return starts


def with_noise(means, total=4000, seed=1):
    """Draw about `total` noisy observations (S, N) around means (E, N), equally many from each."""
    repeats = -(-total // len(means))
    noise = NOISE * np.random.default_rng(seed).normal(size=(repeats, *means.shape))
    return (np.asarray(means)[None] + noise).reshape(-1, means.shape[1])


def scores(predicted, x_test, y_test):
    """Score equally weighted mixtures of normals with the given means (E, N), one row for each."""
    log_likelihood = {
        name: dist.Normal(means, NOISE).log_prob(y_test[None]) for name, means in predicted.items()
    }
    draws = {name: with_noise(means) for name, means in predicted.items()}
    return scoring.summary(draws, y_test, truth=truth(x_test), log_likelihood=log_likelihood)


def guide_start(key):
    """Draw one member's start for the locations of a mean-field guide."""
    return {f"{name}_auto_loc": value for name, value in small_start(key).items()}


CONSTANT = optax.adam(5e-3)
COSINE = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS))
MAP_ROWS = {
    "MAP, starts Uniform(-2, 2)": (CONSTANT, init_to_uniform, None),
    "MAP, starts from the prior": (CONSTANT, init_to_sample, None),
    "MAP, starts 0.5 * normal": (CONSTANT, init_to_uniform, small_start),
    "MAP, the same, cosine from 2e-2": (COSINE, init_to_uniform, small_start),
}
VI_ROWS = {
    "VI, defaults": (CONSTANT, 0.1, None, 1.0),
    "VI, small starts, cosine": (COSINE, 0.01, guide_start, 1.0),
    "VI, the same, kl_weight 0.1": (COSINE, 0.01, guide_start, 0.1),
}


PICTURED = ("MAP, the same, cosine from 2e-2", "VI, the same, kl_weight 0.1")


def fit_map(optim, init_loc_fn, starts, x, y, x_test):
    """Fit an ensemble of MAP estimates and return its predicted means (E, N)."""
    runner = EnsembleMAP(model, optim, ensemble_size=MEMBERS, init_loc_fn=init_loc_fn)
    result = runner.run(jax.random.key(0), STEPS, x, y, init_params=starts, progress_bar=False)
    return ensemble_predict(result.params, network, jnp.asarray(x_test))


def fit_vi(optim, init_scale, starts, kl_weight, x, y, x_test):
    """Fit an ensemble of mean-field guides and return the means (E * 50, N) of their draws."""
    guide = AutoNormal(model, init_scale=init_scale)
    runner = EnsembleVI(
        model, guide, optim, Trace_ELBO(), ensemble_size=MEMBERS, kl_weight=kl_weight
    )
    result = runner.run(jax.random.key(0), STEPS, x, y, init_params=starts, progress_bar=False)
    draws = runner.sample_posterior(jax.random.key(1), result, x, num_samples=50)
    draws = {name: draws[name] for name in small_start(jax.random.key(0))}
    return ensemble_predict(draws, network, jnp.asarray(x_test))


def fit_rows():
    """Fit all rows; return their scores as a table, and their predicted means by name."""
    x, y, x_test, y_test = make_data()
    predicted, seconds = {}, {}
    for rows, fit in ((MAP_ROWS, fit_map), (VI_ROWS, fit_vi)):
        for name, settings in rows.items():
            begin = time.perf_counter()
            predicted[name] = np.asarray(fit(*settings, x, y, x_test))
            seconds[name] = time.perf_counter() - begin
    table = scores(predicted, x_test, y_test)
    table.insert(0, "time [s]", seconds)
    table.loc["oracle"] = {  # knows the function and the noise
        "RMSE truth": 0.0, "RMSE": NOISE, "NLL": -0.884, "CRPS": NOISE / np.sqrt(np.pi),
        "coverage 0.95": 0.95, "width 0.95": 0.40,
    }  # fmt: skip
    return table, predicted


def show(table):
    """Print the table."""
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))


def picture(predicted, path="quickstart.png"):
    """Draw bands above and calibration below, for a MAP and a variational ensemble.

    Returns inputs, means, draws and data of the variational one.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    x, y, x_test, y_test = make_data()
    grid = {"height_ratios": [3, 2]}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), gridspec_kw=grid, layout="constrained")
    for name, (above, below) in zip(PICTURED, axes.T, strict=True):
        means = predicted[name]
        draws = with_noise(means)
        members = means.reshape(MEMBERS, -1, means.shape[1])
        plotting.plot_predictive(x_test, members, draws, data=(x, y), ax=above)
        above.set(title=name.replace("the same, ", ""), ylim=(-1.2, 1.8))
        plotting.plot_calibration(draws, y_test, ax=below)
    axes[0, 0].legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return x_test, members, draws, (x, y)


if __name__ == "__main__":
    print(f"{MEMBERS} members, {STEPS} steps; run times include compilation")
    table, predicted = fit_rows()
    show(table)
    shown = picture(predicted)
    print("Bands and calibration are drawn in quickstart.png.")
    overview(*shown)
    print("An ensemble, chains and a process are drawn in overview.png.")

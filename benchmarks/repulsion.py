"""The cost of a step with repulsion, compared with NumPyro's SVGD, and its effect on predictions.

Run `python benchmarks/repulsion.py` (ten minutes), or with `speed` or `scores` for one half.

Speed: 32 members of a 1-64-64-1 network on the sinc problem, Adam, all in one process and in turns.
The data have 80 rows. Members that repel by their functions are compared at 20 inputs. NumPyro's
`SVGD` (32 particles, the same network and optimiser, jitted) is timed in the same process.

Scores: the same network without the rows between 1 and 6. All starts are near zero, so that without
repulsion members agree where there are no data. Log scores are those of the equally weighted
mixture at noisy test points. "gap" are the scores between 1 and 6 or beyond 10, where there are no
rows.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import X, Y, clocked, in_turns, report, timed
from numpyro.contrib.einstein import SVGD, RBFKernel
from numpyro.infer import Predictive, init_to_uniform
from quickstart import NOISE, make_data
from records import note, saved, sized

from numpyro_ensemble import EnsembleMAP, Repulsion

WIDTHS = (1, 64, 64, 1)
MEMBERS, STEPS, REPEATS = 32, 60, sized(40, 5)
GRID = jnp.linspace(-12.0, 12.0, 20)


def model(x, y=None):
    """A network whose weights have standard-normal priors."""
    hidden = x[:, None]
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        prior = dist.Normal(0.0, 1.0)
        w = numpyro.sample(f"w{layer}", prior.expand([fan_in, fan_out]).to_event(2))
        b = numpyro.sample(f"b{layer}", prior.expand([fan_out]).to_event(1))
        hidden = hidden @ w + b[None]
        hidden = jnp.tanh(hidden) if layer < len(WIDTHS) - 2 else hidden
    f = numpyro.deterministic("f", hidden[:, 0])
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(f, NOISE), obs=y)


def by_function(weight=1.0):
    """Return a repulsion by the network's values on a grid."""
    return Repulsion(site="f", inputs=GRID, weight=weight)


def runner(repulsion, members=MEMBERS):
    """Return a new runner."""
    return EnsembleMAP(model, numpyro.optim.Adam(5e-3), ensemble_size=members, repulsion=repulsion)


def svgd_steps():
    """Return a compiled function of a key that takes as many steps of NumPyro's SVGD."""
    guide = {"init_loc_fn": init_to_uniform}
    optim = numpyro.optim.Adam(5e-3)
    svgd = SVGD(model, optim, RBFKernel(), num_stein_particles=MEMBERS, guide_kwargs=guide)
    state = svgd.init(jax.random.key(0), X, Y)

    @jax.jit
    def steps(state):
        return jax.lax.fori_loop(0, STEPS, lambda _, s: svgd.update(s, X, Y)[0], state)

    return lambda key: steps(state._replace(rng_key=key)).optim_state


def speed():
    """Compare the time of steps."""
    plain = runner(None)

    def steps(ensemble):
        return lambda key: ensemble.run(key, STEPS, X, Y, progress_bar=False).losses

    timed(steps(plain), jax.random.key(99))
    for name, repulsion in {
        "SVGD": Repulsion(),
        "kernel density": Repulsion(method="wgd"),
        "function, 20 inputs": by_function(),
    }.items():
        pushed = runner(repulsion)
        timed(steps(pushed), jax.random.key(99))
        pairs = in_turns(steps(pushed), steps(plain), REPEATS)
        report(f"{name} / plain, {MEMBERS} members", pairs, "<= 1.5")
    theirs = svgd_steps()
    timed(theirs, jax.random.key(99))
    report(f"NumPyro's SVGD / plain, {MEMBERS}", in_turns(theirs, steps(plain), sized(10, 3)))
    pushed = runner(Repulsion())
    timed(steps(pushed), jax.random.key(99))
    report(f"NumPyro's SVGD / ours, {MEMBERS}", in_turns(theirs, steps(pushed), sized(10, 3)))


def near_zero(key):
    """Draw a member's start, with a tenth of the prior's scale."""
    start = {}
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        key, key_w, key_b = jax.random.split(key, 3)
        start[f"w{layer}"] = 0.1 * jax.random.normal(key_w, (fan_in, fan_out))
        start[f"b{layer}"] = 0.1 * jax.random.normal(key_b, (fan_out,))
    return start


def scores():
    """Print the spread and the log scores of members with and without repulsion."""
    steps = sized(1000, 200)
    x, y, x_test, y_test = make_data()
    kept = ~((x > 1.0) & (x < 6.0))
    gap = ((x_test > 1.0) & (x_test < 6.0)) | (np.abs(x_test) > 10.0)
    for name, repulsion in {
        "plain": None,
        "SVGD": Repulsion(),
        "kernel density": Repulsion(method="wgd"),
        **{f"function, weight {weight}": by_function(weight) for weight in (0.3, 1.0, 3.0, 10.0)},
    }.items():
        result, seconds, _ = clocked(
            runner(repulsion).run,
            jax.random.key(0), steps, jnp.asarray(x[kept]), jnp.asarray(y[kept]),
            init_params=near_zero, progress_bar=False,
        )  # fmt: skip
        predict = Predictive(model, result.params, batch_ndims=1)
        f = predict(jax.random.key(1), jnp.asarray(x_test))["f"]
        log_density = dist.Normal(f, NOISE).log_prob(y_test[None])
        score = np.asarray(jax.nn.logsumexp(log_density, axis=0) - np.log(MEMBERS))
        spread = np.asarray(f.std(axis=0))
        print(
            f"{name:22} spread: rows {spread[~gap].mean():.3f}, gap {spread[gap].mean():.3f}; log "
            f"score: all {score.mean():6.3f}, rows {score[~gap].mean():6.3f}, gap "
            f"{score[gap].mean():6.3f}; {seconds:.0f} s",
            flush=True,
        )
        note(
            f"{name}, {steps} steps, cold", ours=seconds, spread_at_rows=spread[~gap].mean(),
            spread_elsewhere=spread[gap].mean(), log_score_at_rows=score[~gap].mean(),
            log_score_elsewhere=score[gap].mean(),
        )  # fmt: skip


if __name__ == "__main__":
    with saved("repulsion"):
        for part in sys.argv[1:] or ["speed", "scores"]:
            {"speed": speed, "scores": scores}[part]()

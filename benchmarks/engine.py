"""Costs of a fit besides its arithmetic: new data, single steps, loops over batches, memory.

Run `python benchmarks/engine.py` for all, or with the names of some: `other`, `update`, `loop`,
`unknown`, `single`, `memory`. Ratios are measured in one process, in turns. `single` compares 16
members with one fit by `SVI`, both warm and in a compiled loop.
"""

import collections
import gc
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import difference, final_losses, in_turns, report, timed
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from records import note, saved, sized

from numpyro_ensemble import EnsembleMAP, EnsembleVI

KEY = jax.random.key(0)
ADAM = numpyro.optim.Adam(1e-2)


def regression(x, y):
    """A linear regression on the columns of a table."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)


def table(rows, columns, seed=0):
    """Return random data as arrays of JAX."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, columns)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x.sum(1))


def ensemble(members=4):
    """Return a runner of mean-field fits of the regression."""
    return EnsembleVI(regression, AutoNormal(regression), ADAM, Trace_ELBO(), ensemble_size=members)


def by_hand(x, y, members=4):
    """Return the start and a compiled step of `members` copies of `SVI`, vmapped by hand."""
    guide = AutoNormal(regression)
    svi = SVI(regression, guide, ADAM, Trace_ELBO())
    svi.init(KEY, x, y)  # sets the guide up with concrete values
    start = jax.vmap(lambda key: svi.init(key, x, y))(jax.random.split(KEY, members))
    step = jax.jit(jax.vmap(svi.update, in_axes=(0, None, None)))
    return start, step


def other():
    """Compare a run on other data of the same shapes with one on the same data."""
    data = [table(500, 8, seed) for seed in range(30)]
    runner = EnsembleMAP(regression, ADAM, ensemble_size=16)
    turns = iter(data)

    def run(x, y):
        return runner.run(KEY, 1000, x, y, progress_bar=False).losses

    timed(run, *next(turns))
    pairs = in_turns(lambda _: run(*next(turns)), lambda _: run(*data[0]), sized(15, 5))
    name = "run on other data / on the same data, warm"
    report(name, pairs, "<= 1.0", **final_losses(*pairs.values))


def update():
    """Compare one step on 320 MB of arrays with the step that was vmapped by hand."""
    x, y = table(10_000_000, 8)
    runner = ensemble()
    state = runner.init(KEY, x, y)
    start, step = by_hand(x, y)
    timed(runner.update, state, x, y)
    timed(step, start, x, y)
    pairs = in_turns(
        lambda _: runner.update(state, x, y)[1], lambda _: step(start, x, y)[1], sized(7, 3)
    )
    report("update on 320 MB / jit(vmap(SVI.update))", pairs, "<= 1.2")


def steps(step, state, batches):
    """Take a step on each batch, and return the last losses."""
    for x, y in batches:
        state, losses = step(state, x, y)
    return losses


def loop():
    """Compare a thousand steps over minibatches with the loop that was written by hand."""
    for rows, columns in sized([(256, 16), (4096, 64)], [(256, 16)]):
        x, y = table(rows * 50, columns)
        batches = [(x[i : i + rows], y[i : i + rows]) for i in range(0, rows * 50, rows)] * 20
        runner = ensemble(16)
        state = runner.init(KEY, *batches[0])
        start, step = by_hand(*batches[0], members=16)
        for warm in (runner.update, step):
            timed(warm, start if warm is step else state, *batches[0])
        pairs = in_turns(
            lambda _: steps(runner.update, state, batches),  # noqa: B023
            lambda _: steps(step, start, batches),  # noqa: B023
            sized(5, 3),
        )
        name = f"1,000 updates over batches of {rows} x {columns} / by hand"
        last = (losses[:, None] for losses in pairs.values)
        report(name, pairs, "<= 1.2", **final_losses(*last))


def unknown():
    """Time a model that is traced in every run, because the deque it reads cannot be compared."""
    held = collections.deque([1.0])

    def model(x, y):
        regression(x, y)
        numpyro.factor("held", jnp.zeros(()) * held[0])

    x, y = table(500, 8)
    runners = [EnsembleMAP(m, ADAM, ensemble_size=16) for m in (model, regression)]

    def run(runner):
        return runner.run(KEY, 1000, x, y, progress_bar=False).losses

    for runner in runners:
        timed(run, runner)
    pairs = in_turns(lambda _: run(runners[0]), lambda _: run(runners[1]), sized(7, 3))
    name = "run of a model that reads a deque / of one that reads a number, warm"
    report(name, pairs, **difference(*pairs.values))


def network(x, y):
    """A network with a hidden layer of 100 units, and 10,000 weights for 99 columns."""
    inner = numpyro.sample("inner", dist.Normal(0.0, 0.1).expand([x.shape[1], 100]).to_event(2))
    outer = numpyro.sample("outer", dist.Normal(0.0, 0.1).expand([100]).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ inner) @ outer, 1.0), obs=y)


SINGLE = {
    "10 parameters, 100 rows": (regression, 100, 9, 2000),
    "10 parameters, 10,000 rows": (regression, 10_000, 9, 2000),
    "10,000 parameters, 100 rows": (network, 100, 99, 200),
}


def single():
    """Compare 16 members with one fit by `SVI`, when nothing is compiled."""
    for name, (model, rows, columns, number) in SINGLE.items():
        data = table(rows, columns)
        runner = EnsembleVI(model, AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=16)
        svi = SVI(model, AutoNormal(model), ADAM, Trace_ELBO())
        svi.init(KEY, *data)  # sets the guide up with concrete values

        @jax.jit
        def one(key, x, y, svi=svi, number=number):
            step = lambda state, _: svi.update(state, x, y)  # noqa: E731
            return jax.lax.scan(step, svi.init(key, x, y), length=number)[1]

        def sixteen(key, runner=runner, number=number, data=data):
            return runner.run(key, number, *data, progress_bar=False).losses

        for fit in (sixteen, lambda key: one(key, *data)):  # noqa: B023
            timed(fit, KEY)
        pairs = in_turns(sixteen, lambda key: one(key, *data), sized(7, 5))  # noqa: B023
        figures = final_losses(*pairs.values)
        report(f"16 members / ONE SVI, warm, {number} steps, {name}", pairs, **figures)


def resident():
    """Return the memory in use now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def memory():
    """Print the memory in use after 10 and after 100 runs, each on its own 10 MB of data."""
    runner, kept = EnsembleMAP(regression, ADAM, ensemble_size=4), []
    for run in range(1, 101):
        x, y = table(160_000, 16, seed=run)
        kept.append(runner.run(KEY, 5, x, y, progress_bar=False))
        del x, y
        if run in (10, 100):
            gc.collect()
            print(f"after {run} runs on 10 MB each: {resident():.0f} MiB, all results kept")
            note(f"memory in use after {run} runs on 10 MB each", mib=resident())


TASKS = {f.__name__: f for f in (other, update, loop, unknown, single, memory)}

if __name__ == "__main__":
    with saved("engine"):
        for task in sys.argv[1:] or TASKS:
            TASKS[task]()

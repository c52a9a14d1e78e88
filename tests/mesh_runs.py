"""Compare runs on four forced devices with runs on one, and print JSON for `test_sharding`."""

import json
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix
from jax.sharding import NamedSharding, PartitionSpec
from numpyro.infer import MCMC, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_ensemble import (
    EarlyStopping,
    EnsembleMAP,
    EnsemblePredictive,
    EnsembleVI,
    Repulsion,
    to_arviz,
)
from numpyro_ensemble.gp import RBF, GaussianProcess, Pathwise
from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES
from numpyro_ensemble.sharding import as_mesh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.3 * RNG.normal(size=48)
OWN = Y + RNG.normal(size=(8, 48))
KEY = 0
MESHES = {}  # filled below with meshes of four devices
found: dict[str, object] = {}


def model(x, y=None, failing=0.0):
    """A regression with sites in no order, a matrix beside a scalar, and members that may fail."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3, 1]).to_event(2))
    a = numpyro.sample("a", dist.HalfNormal(1))
    base = numpyro.sample("base", dist.StudentT(4, 0, 1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal((x @ w)[:, 0] + base + jnp.log1p(-failing), a), obs=y)


def vi(guide=AutoNormal, ensemble_size=5, **options):
    optim, loss = numpyro.optim.Adam(0.05), Trace_ELBO()
    return EnsembleVI(model, guide(model), optim, loss, ensemble_size=ensemble_size, **options)


def eight(**options):
    return vi(ensemble_size=8, **options)


def modes(**options):
    solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
    return EnsembleMAP(model, solver, ensemble_size=5, **options)


def repelled(ensemble_size=5, **options):
    """Return a runner whose members repel each other."""
    optim, by = numpyro.optim.Adam(0.05), Repulsion()
    return EnsembleMAP(model, optim, ensemble_size=ensemble_size, repulsion=by, **options)


def repelled_by_values(**options):
    runner = repelled(**options)
    runner.repulsion = Repulsion(site="y", inputs=(X[:7],))
    return runner


def apart(one, other):
    """Return the largest difference of two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    arrays = [tuple(np.nan_to_num(np.asarray(leaf, float)) for leaf in pair) for pair in pairs]
    return max(float(abs(a - b).max() / max(abs(b).max(), 1e-300)) for a, b in arrays)


def outcome(result):
    """Return the parts of a result that are compared."""
    return result.params, result.losses, result.state.optim_state[0]


def quiet(runner, *args, steps=100, key=KEY, **options):
    return runner.run(key, steps, *args, progress_bar=False, **options)


RUNS = {
    "plain": (vi, (X, Y), {}),
    "batches": (vi, (X, Y), {"batch_size": 20}),
    "batches of its own": (vi, (X, Y), {"batch_size": 20, "shared_batches": False}),
    "data of its own": (eight, (X, OWN), {"member_args": [1]}),
    "batches of its own data": (eight, (X, OWN), {"member_args": [1], "batch_size": 16}),
    "stopping": (vi, (X, Y), {"early_stopping": EarlyStopping(2, window=10), "steps": 300}),
    "repelled": (repelled, (X, Y), {"batch_size": 20}),
    "repelled by values": (repelled_by_values, (X, Y), {"stable_update": True}),
    "starts": (vi, (X, Y), {"init_params": {"base_auto_loc": np.arange(5.0)}}),
}


QUICK = ["batches of its own data"]


def compare_modes():
    """Compare where a minimiser ends; rounding may cost one step."""
    one = quiet(modes(), X, Y)
    for name, mesh in MESHES.items():
        found[f"minimiser, {name}"] = apart(quiet(modes(mesh=mesh), X, Y).params, one.params)


def compare_runs(kinds, meshes):
    """Compare runs on one device with those on meshes."""
    for label in kinds:
        make, args, options = RUNS[label]
        one = quiet(make(), *args, **options)
        for name in meshes:
            many = quiet(make(mesh=MESHES[name]), *args, **options)
            found[f"{label}, {name}"] = apart(outcome(many), outcome(one))
            found["devices"] = len(jax.tree.leaves(many.params)[0].sharding.device_set)


def compare_states():
    one, many = vi(AutoMultivariateNormal), vi(AutoMultivariateNormal, mesh="all")
    states = [runner.init(KEY, X, Y) for runner in (one, many)]
    found["states, start"] = apart(*(s.optim_state for s in states[::-1]))
    stepped = [r.update(s, X, Y) for r, s in zip((one, many), states, strict=True)]
    found["states, update"] = apart(*((s.optim_state, loss) for s, loss in stepped[::-1]))
    found["states, evaluate"] = apart(many.evaluate(states[1], X, Y), one.evaluate(states[0], X, Y))
    found["states, get_params"] = apart(many.get_params(states[1]), one.get_params(states[0]))
    found["states, leading"] = sorted({leaf.shape[0] for leaf in jax.tree.leaves(states[1][:3])})


def compare_states_of_runs():
    one, many = vi(AutoMultivariateNormal), vi(AutoMultivariateNormal, mesh="all")
    half = quiet(many, X, Y, steps=50)
    whole = quiet(one, X, Y)
    more = quiet(many, X, Y, steps=50, init_state=half.state)
    found["runs, gone on from"] = apart(more.params, whole.params)
    draws = [r.sample_posterior(KEY, result, X, Y) for r, result in ((many, more), (one, whole))]
    found["runs, draws"] = apart(*draws)
    plain = quiet(one, X, Y, steps=50, init_state=jax.device_get(half.state))
    found["runs, taken home"] = apart(plain.params, whole.params)


def watch_failures():
    """Run with one member of five that fails, over four devices."""
    failing = np.array([0.0, 0.0, 0.0, 0.0, 2.0])
    seen = []
    runner = vi(mesh=MESHES["members"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quiet(
            runner, X, Y, failing, steps=40, member_args=[2], callback=lambda *a: seen.append(a)
        )
    found["failures, finite"] = np.asarray(result.finite).tolist()
    found["failures, said"] = [str(w.message) for w in caught if "members" in str(w.message)]
    found["another key"] = apart(result.losses[1], result.losses[0])
    _, state, losses = seen[0]
    found["failures, callback"] = [losses.shape[0], jax.tree.leaves(state)[0].shape[0]]


def grouped(x, y):
    """A model with effects by an index, whose gradient is computed for a few chains at once."""
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("groups", 6):
        b = numpyro.sample("b", dist.Normal(0, scale))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(b[np.arange(48) % 6] + x[:, 0], 0.5), obs=y)


def chains(kernel, num_chains, args=(X, Y), **options):
    """Return chains after a short run."""
    mcmc = MCMC(
        kernel, num_warmup=15, num_samples=5, num_chains=num_chains, chain_method="vectorized",
        progress_bar=False, **options,
    )  # fmt: skip
    mcmc.run(jax.random.key(1), *args)
    return mcmc


def compare_chains(kinds):
    """Compare chains on one device with those on four, whatever the number of chains."""
    for label in kinds:
        make, num_chains = CHAINS[label]
        one = chains(make(), num_chains)
        if "rows" in label:
            mesh = as_mesh(MESHES["members and rows"])  # the mesh's axes are Auto
            rows = jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))
            many = chains(make(mesh=mesh), num_chains, rows, jit_model_args=True)
        else:
            many = chains(make(mesh="all"), num_chains)
        found[f"{label}, draws"] = apart(many.get_samples(), one.get_samples())
        moved = np.ptp(np.asarray(one.last_state.potential_energy))
        assert moved > 1e-3, "chains differ"
        state = many.last_state.z["b" if "grouped" in label else "w"]
        found[f"{label}, devices"] = len(state.sharding.device_set)
        found[f"{label}, spread"] = not state.sharding.is_fully_replicated


def meads(**options):
    return MEADS(model, num_folds=2, start="init", **options)


def chees(model=model, **options):
    return ChEES(model, start="init", max_leapfrog_steps=4, **options)


CHAINS = {
    "MEADS of 8": (meads, 8),
    "ChEES of 6, grouped": (lambda **options: chees(grouped, **options), 6),
    "ChEES of rows": (lambda **options: chees(**options), 8),
    "MAMS of 8": (lambda **options: MAMS(model, start="init", max_steps=4, **options), 8),
    "MCLMC of 8": (lambda **options: MCLMC(model, start="init", **options), 8),
}


def poison(mesh):
    """Fit 1,000 members, and again with 100 that fail in three ways; return both and the failed."""
    size, ways = 1000, np.random.default_rng(1).permutation(1000)[:100]
    by_data, by_rate, by_start = ways[:34], ways[34:67], ways[67:]
    own = Y[:12] + 0.1 * RNG.normal(size=(size, 12))
    start = RNG.normal(size=size)
    optim = optax.inject_hyperparams(optax.adam)(learning_rate=0.05)
    results = []
    for poisoned in (False, True):
        data, first = own.copy(), start.copy()
        if poisoned:
            data[by_data, 3], first[by_start] = np.nan, np.inf
        runner = EnsembleVI(
            model, AutoNormal(model), optim, Trace_ELBO(), ensemble_size=size, mesh=mesh
        )

        def run(state=None, steps=1, runner=runner, data=data, first=first):
            starts = {"init_params": {"base_auto_loc": first}} if state is None else {}
            return quiet(
                runner, X[:12], data, steps=steps, member_args=[1], init_state=state, **starts
            )

        state = run().state
        if poisoned:
            state = jax.tree_util.tree_map_with_path(
                lambda path, x: x.at[by_rate].set(1e200) if "learning_rate" in str(path) else x,
                state,
            )
        results.append(run(state, 30))
    return *results, ways


def poison_thousand():
    """Compare members of runs with and without failing members, plain and on four devices."""
    for label, mesh in (("plain", None), ("sharded", "all")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clean, sick, ways = poison(mesh)
        others = np.setdiff1d(np.arange(1000), ways)
        trees = ((r.params, r.losses, r.state.optim_state) for r in (clean, sick))
        same = [
            np.array_equal(np.asarray(a)[others], np.asarray(b)[others])
            for a, b in zip(*map(jax.tree.leaves, trees), strict=True)
        ]
        found[f"poison, {label}, same"] = all(same)
        found[f"poison, {label}, named"] = np.array_equal(
            np.flatnonzero(~np.asarray(sick.finite)), np.sort(ways)
        )
        assert np.asarray(clean.finite).all()
        found[f"poison, {label}, said"] = [
            str(w.message).split(":")[0] for w in caught if "members" in str(w.message)
        ]


def process(x, y):
    """A Gaussian process."""
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", GaussianProcess(RBF(lengthscale=lengthscale), x, noise=0.1), obs=y)


def predicted(mesh):
    """Return predictions and ArviZ data from draws, of which devices hold unequal numbers."""
    runner = vi()
    result = quiet(runner, X, Y, steps=20)
    predictive = EnsemblePredictive(model, result, guide=runner.guide, num_samples=2, mesh=mesh)
    values = predictive(jax.random.key(2), X, None)
    data = to_arviz(runner, result, X, Y, num_samples=2, rng_key=jax.random.key(3), mesh=mesh)
    groups = ("log_likelihood", "posterior_predictive", "sample_stats")
    arrays = [np.asarray(data[group][name]) for group in groups for name in data[group]]
    samples = {"lengthscale": np.linspace(0.5, 2.0, 9)}
    pathwise = Pathwise(process, samples, X[:9, 0], Y[:9], mesh=mesh)
    functions = pathwise(jax.random.key(4), X[:5, 0], None)
    drawn = pathwise.draw(jax.random.key(4))["y"](X[:5, :1])
    moments = pathwise.moments(X[:5, 0], None)["y"].mean
    return values, arrays, functions, drawn, moments, stored(mesh, runner, result, predictive)


def stored(mesh, runner, result, predictive):
    """Return predictions and ArviZ groups that were written to stores in blocks of rows."""
    if mesh is not None and as_mesh(mesh).is_multi_process:
        mesh, predictive = (
            None,
            EnsemblePredictive(model, result, guide=runner.guide, num_samples=2),
        )
    quietly = {"row_args": ["x"], "row_batch_size": 24, "progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        values = predictive.to_zarr(f"{folder}/a", jax.random.key(2), X, None, **quietly)
        data = to_arviz(
            runner, result, X, Y, num_samples=2, rng_key=jax.random.key(3), mesh=mesh,
            store=f"{folder}/b", **{**quietly, "row_args": ["x", "y"]},
        )  # fmt: skip
        groups = ("log_likelihood", "sample_stats")
        arrays = [np.asarray(data[group][name]) for group in groups for name in data[group]]
        return np.asarray(values["y"]), arrays


def compare_predictions():
    """Compare predictions on one device with those on four."""
    many, one = predicted("all"), predicted(None)
    found["predictions"] = apart(many, one)
    found["predictions, devices"] = len(many[0]["y"].sharding.device_set)


def say_errors():
    bad = {
        "axes": lambda: vi(mesh=jax.make_mesh((4,), ("chain",))),
        "kind": lambda: vi(mesh=4),
        "few": lambda: EnsembleMAP(model, ensemble_size=3, mesh="all").init(KEY, X, Y),
        "chains": lambda: chains(chees(mesh="all"), 3),
        "few chains": lambda: ChEES(model, mesh=jax.make_mesh((4,), ("chain",))),
        "few draws": lambda: EnsemblePredictive(model, {"a": np.ones(3)}, mesh="all"),
        "rows": lambda: vi(mesh=MESHES["members and rows"]).init(KEY, X[:47], Y[:47]),
    }
    for label, call in bad.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            found[f"error, {label}"] = f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    assert len(jax.devices()) == 4 and jax.config.jax_enable_x64
    warnings.simplefilter("ignore")
    MESHES["members"] = jax.make_mesh((4,), ("member",))
    MESHES["members and rows"] = jax.make_mesh((2, 2), ("member", "data"))
    if "long" in sys.argv:
        compare_runs(RUNS, MESHES)
        compare_states_of_runs()
        compare_chains(CHAINS)
        compare_predictions()
        compare_modes()
        poison_thousand()
        compare_states()
    else:
        compare_runs(QUICK, ["members and rows"])
        for part in (watch_failures, say_errors):
            part()
    json.dump(found, sys.stdout)

"""A script that `test_hosts` runs in several processes with one mesh of devices; prints JSON."""

import io
import json
import shutil
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import jax
import numpy as np
from mesh_runs import OWN, X, Y, apart, chees, eight, model, outcome, predicted, quiet, vi
from numpyro.infer import MCMC

from numpyro_ensemble import Checkpoint, EnsemblePredictive
from numpyro_ensemble.mcmc import run_checkpointed

found: dict[str, object] = {}


def compare(label, many, one):
    found[f"apart, {label}"] = apart(many, one)


def fits():
    """Compare fits on the devices of all processes with fits of each process alone."""
    rows = jax.make_mesh((2, jax.device_count() // 2), ("member", "data"))
    one, bar = quiet(vi(ensemble_size=9), X, Y, steps=60), io.StringIO()
    with redirect_stderr(bar):
        many = vi(mesh="all", ensemble_size=9).run(0, 60, X, Y)
    compare("members", outcome(many), outcome(one))
    found["local"] = all(x.is_fully_addressable for x in jax.tree.leaves((many.params, many.state)))
    found["bar"] = "60/60" in bar.getvalue()
    options = {"member_args": [1], "batch_size": 16, "steps": 60}
    own = [quiet(eight(**o), X, OWN, **options) for o in ({"mesh": rows}, {})]
    compare("rows, batches of its own data", *map(outcome, own))
    spread = quiet(eight(mesh="all"), X, Y, steps=20, gather=False)
    found["left spread"] = not spread.params["w_auto_loc"].is_fully_addressable
    more = quiet(eight(mesh="all"), X, Y, steps=20, init_state=spread.state)
    compare("gone on from", more.params, quiet(eight(), X, Y, steps=40).params)


def steps():
    """Compare single steps, and the losses and parameters that are read between steps."""
    one, many = vi(ensemble_size=9), vi(mesh="all", ensemble_size=9)
    states = [runner.init(0, X, Y) for runner in (many, one)]
    stepped = [r.update(s, X, Y) for r, s in zip((many, one), states, strict=True)]
    compare("losses of a step", *(losses for _, losses in stepped))
    compare("evaluate", many.evaluate(stepped[0][0], X, Y), one.evaluate(stepped[1][0], X, Y))
    compare("get_params", many.get_params(stepped[0][0]), one.get_params(stepped[1][0]))


def chains():
    """Compare chains that divide evenly among the devices, and chains that do not."""
    compare_chains(8, "8 chains, run")  # no "apart": rounding changes these, so only run them
    compare_chains(9, "apart, 9 chains")


def compare_chains(number, label):
    found[label] = apart(*(chains_of(number, mesh) for mesh in ("all", None)))


def chains_of(number, mesh="all", args=(X, Y), checkpoint=None):
    mcmc = MCMC(
        chees(mesh=mesh), num_warmup=15, num_samples=5, num_chains=number,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    fields, key = ("adapt_state.step_size", "accept_prob"), jax.random.key(1)
    if checkpoint is None:
        mcmc.run(key, *args, extra_fields=fields)
    else:
        run_checkpointed(mcmc, checkpoint, key, *args, extra_fields=fields)
    return jax.tree.map(np.asarray, (mcmc.get_samples(), mcmc.get_extra_fields()))


def predictions():
    """Compare predictions, data for ArviZ and functions of processes."""
    compare("predictions", predicted("all"), predicted(None))


def refused(label, call):
    """Record the message of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        found[f"said, {label}"] = str(error)


def agreed(directory):
    """Pass different arguments in each process, end a run from one, and lose checkpoints."""
    own = jax.process_index()
    runner = vi(mesh="all", ensemble_size=9)
    refused("data", lambda: quiet(runner, X, Y + own, steps=2))
    refused("keys", lambda: quiet(runner, X, Y, steps=2, key=own))
    refused("names", lambda: quiet(runner, X, Y, *[0.1] * own, steps=2))
    refused("chains", lambda: chains_of(8, args=(X + own, Y)))
    samples = {"a": np.ones(8) + own, "w": np.ones((8, 3, 1)), "base": np.ones(8)}
    refused("draws", lambda: EnsemblePredictive(model, samples, mesh="all")(0, X))
    refused("alone", lambda: quiet(vi(), X, Y, steps=2, checkpoint=Checkpoint(directory)))
    store = EnsemblePredictive(model, samples, mesh="all").to_zarr
    refused("store", lambda: store(f"{directory}/store", 0, X, progress_bar=False))
    last = jax.process_count() - 1
    ended = quiet(
        runner, X, Y, steps=40, chunk_size=10, callback=lambda step, *_: own == last and step == 20
    )
    found["ended by one"] = ended.completed_steps
    own_data = {"member_args": [1], "checkpoint": Checkpoint(f"{directory}/own", every=10)}
    half = quiet(eight(mesh="all"), X, OWN, steps=20, **own_data)
    if own == 0:
        shutil.rmtree(next(Path(directory, "own", "20").glob("*/")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = quiet(eight(mesh="all"), X, OWN, steps=20, **own_data)
    found["warned"] = [str(w.message)[:30] for w in caught if "damaged" in str(w.message)]
    compare("gone on from what is whole", outcome(again), outcome(half))
    kept = Checkpoint(f"{directory}/chains", every=10, keep=9)
    first = chains_of(8, checkpoint=kept)
    if own == 0:
        for step in (15, 20):
            shutil.rmtree(f"{directory}/chains/{step}")
    compare("chains gone on with", chains_of(8, checkpoint=kept), first)


def kept(directory, steps=400, every=20):
    """Run with checkpoints, and print the steps as they are taken."""

    def tell(step, *_):
        print("step", step, flush=True)

    checkpoint = Checkpoint(f"{directory}/kept", every=every)
    result = vi(mesh="all", ensemble_size=12).run(
        0, steps, X, Y, batch_size=16, checkpoint=checkpoint, callback=tell, progress_bar=False
    )
    one = quiet(vi(ensemble_size=12), X, Y, batch_size=16, steps=steps)
    compare("gone on from a checkpoint", outcome(result), outcome(one))
    found["steps"] = result.completed_steps


def main(what, directory):
    assert jax.config.jax_enable_x64
    warnings.simplefilter("ignore")
    for part in what.split(","):
        if part in ("kept", "agreed"):
            {"kept": kept, "agreed": agreed}[part](directory)
        else:
            {"fits": fits, "steps": steps, "chains": chains, "predictions": predictions}[part]()
    print(json.dumps(found), flush=True)

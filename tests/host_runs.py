"""What `test_hosts` runs in several processes, whose devices are one mesh: prints JSON."""

import io
import json
import warnings
from contextlib import redirect_stderr

import jax
from mesh_runs import OWN, X, Y, apart, chees, eight, outcome, predicted, quiet, vi
from numpyro.infer import MCMC

from numpyro_ensemble import Checkpoint

found: dict[str, object] = {}


def compare(label, many, one):
    found[f"apart, {label}"] = apart(many, one)


def fits():
    """Compare fits of all processes together with those of each alone."""
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
    """Compare single steps, and what is read between them."""
    one, many = vi(ensemble_size=9), vi(mesh="all", ensemble_size=9)
    states = [runner.init(0, X, Y) for runner in (many, one)]
    stepped = [r.update(s, X, Y) for r, s in zip((many, one), states, strict=True)]
    compare("losses of a step", *(losses for _, losses in stepped))
    compare("evaluate", many.evaluate(stepped[0][0], X, Y), one.evaluate(stepped[1][0], X, Y))
    compare("get_params", many.get_params(stepped[0][0]), one.get_params(stepped[1][0]))


def chains():
    """Compare chains, of which devices have equal numbers, and unequal ones."""
    chains_of(8, "8 chains, run")  # of which rounding makes others: that they run is compared
    chains_of(9, "apart, 9 chains")


def chains_of(number, label):
    draws = []
    for mesh in ("all", None):
        mcmc = MCMC(
            chees(mesh=mesh), num_warmup=15, num_samples=5, num_chains=number,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.run(jax.random.key(1), X, Y)
        draws.append(mcmc.get_samples())
    found[label] = apart(*draws)


def predictions():
    """Compare predictions, data for ArviZ and functions of processes."""
    compare("predictions", predicted("all"), predicted(None))


def kept(directory, steps=400, every=20):
    """Run with checkpoints, and say how far it has come."""

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
        if part == "kept":
            kept(directory)
        else:
            {"fits": fits, "steps": steps, "chains": chains, "predictions": predictions}[part]()
    print(json.dumps(found), flush=True)

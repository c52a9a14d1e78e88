"""A run with checkpoints that `test_checkpoints` kills: `killed_run.py directory every result`."""

import sys
from functools import cache, partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import Checkpoint, EarlyStopping, EnsembleVI

Y = np.random.default_rng(0).normal(size=40)
STEPS = 2000


def model(y, scale=1.0):
    """Have a scalar below a vector, names in no order."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.HalfNormal(scale))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(w.sum(), a), obs=y)


@cache
def runner(scale, rate):
    """Return the runner of these numbers, which has its programs from the second run on."""
    fitted = partial(model, scale=scale)  # a number of the model's own
    optim, loss = numpyro.optim.Adam(rate), Trace_ELBO()
    return EnsembleVI(fitted, AutoNormal(fitted), optim, loss, ensemble_size=3)


def fit(checkpoint=None, callback=None, data=Y, steps=STEPS, scale=1.0, rate=0.02, **options):
    """Run members on batches of their own, some of which stop early, with every option on."""
    options = {"batch_size": 16, "shared_batches": False, "stable_update": True} | options
    rule = EarlyStopping(patience=30, window=20)
    return runner(scale, rate).run(
        jax.random.key(0), steps, data, checkpoint=checkpoint, callback=callback,
        early_stopping=rule, progress_bar=False, **options,
    )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    directory, every, result = sys.argv[1:]
    fit(
        Checkpoint(directory, every=int(every)) if directory else None,
        callback=lambda step, *_: print(step, flush=True),  # what the test waits for
    ).save(result)

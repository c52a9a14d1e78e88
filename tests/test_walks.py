"""Seeded random walks: every result equals that of the same call on another runner, bit for bit.

The other runner is a reference for one kind of call: no other kind of call was made on it.
"""

import functools
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_array_equal
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, to_arviz

ADAM = numpyro.optim.Adam(0.05)
DATA = [jnp.asarray([1.0, 2.0, 0.5, 1.5]), jnp.asarray([9.0, 2.0, 4.0, 7.0]), jnp.full(4, 0.25)]
OPTIONS = {"progress_bar": False}
CALLS_OF_A_WALK = 12


def follows_argument(y):
    z = numpyro.sample("z", dist.Uniform(0.0, jnp.max(y)))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(z + b.sum() + a, 1.0), obs=y)


def follows_latent(y):
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    high = numpyro.sample("high", dist.Uniform(low, low + 3.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(high, 1.0), obs=y)


def looks_at_values(y):
    shift = 1.0 if np.asarray(y).max() > 5.0 else 0.0
    w = numpyro.sample("w", dist.Normal(shift, 1.0))
    numpyro.param(
        "rate", 0.5, constraint=dist.constraints.interval(0.0, float(np.asarray(y).max()))
    )
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=y)


def sampled(runner, key, y, state, result):
    return runner.sample_posterior(key, result, y, num_samples=2)


def predicted(runner, key, y, state, result):
    guide = {"guide": runner.guide} if isinstance(runner, EnsembleVI) else {}
    return EnsemblePredictive(runner.model, result, num_samples=1, **guide)(key, y)


@functools.cache
def jitted_update(runner):
    return jax.jit(runner.update)


@functools.cache
def jitted_run(runner):
    return jax.jit(lambda key, y: runner.run(key, 2, y).params)


CALLS = {  # (runner, key, y, state, result) -> answer
    "init": lambda r, key, y, state, result: r.init(key, y),
    "run": lambda r, key, y, state, result: r.run(key, 2, y, **OPTIONS),
    "concrete": lambda r, key, y, state, result: r.run(key, 2, y, jit_model_args=False, **OPTIONS),
    "go on": lambda r, key, y, state, result: r.run(key, 2, y, init_state=state, **OPTIONS),
    "update": lambda r, key, y, state, result: r.update(state, y),
    "evaluate": lambda r, key, y, state, result: r.evaluate(state, y),
    "get_params": lambda r, key, y, state, result: r.get_params(state),
    "sample": sampled,
    "predict": predicted,
    "export": lambda r, key, y, state, result: to_arviz(
        r, result, y, num_samples=2, log_likelihood=False
    ),
    "batches": lambda r, key, y, state, result: r.run(key, 2, y, batch_size=2, **OPTIONS),
    "members": lambda r, key, y, state, result: r.run(
        key, 2, jnp.stack([y, y + 1.0]), member_args=[0], **OPTIONS
    ),
    "jit": lambda r, key, y, state, result: jitted_update(r)(state, y),
    "jitted run": lambda r, key, y, state, result: jitted_run(r)(key, y),
}
TRACED = {"batches", "members", "jit", "jitted run"}  # the model sees no concrete values
COMPILED = {"batches", "concrete", "export", "jit", "jitted run", "members"}
HELD = {"init", "run", "go on", "concrete", "batches"}


def make(kind, model, guide):
    if kind == "map":
        return EnsembleMAP(model, ADAM, ensemble_size=2)
    return EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)


def names_of_calls(kind, model, quick):
    """Return the names that a walk chooses from: slow calls are listed once or not at all."""
    unfit = TRACED if model is looks_at_values else set()
    unfit = unfit | (COMPILED - {"jit"} if quick else set())
    names = sorted(set(CALLS) - unfit - ({"sample"} if kind == "map" else set()))
    return [name for name in names for _ in range(1 if name in COMPILED else 4)]


def arrays(answer):
    """Return the arrays of an answer, with keys as numbers."""
    if hasattr(answer, "groups") or hasattr(answer, "children"):
        return [np.asarray(v) for v in answer["posterior"].data_vars.values()]
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(answer)
    ]


def answer_or_message(call, runner, given):
    try:
        return call(runner, *given)
    except ValueError as error:  # the data are outside the state's support
        return str(error)


def require_equal(answer, expected, where):
    if isinstance(answer, str):
        assert answer == expected
        return
    ours, theirs = arrays(answer), arrays(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_array_equal(a, b, err_msg=where)


class Walker:
    """Two runners that share a guide, and references that are called in one way each."""

    def __init__(self, model, kinds, guide, quick):
        self.model, self.kinds, self.guide = model, kinds, guide
        self.quick = quick
        self.references = {}
        self.runners = [make(kind, self.model, self.guide) for kind in self.kinds]
        self.held = [(None, None), (None, None)]  # the last state and result of each runner

    def reference(self, kind, name):
        if (kind, name) not in self.references:
            self.references[kind, name] = make(kind, self.model, self.guide)
        return self.references[kind, name]

    def step(self, choose, where):
        which = choose.randrange(2)
        kind, (state, result) = self.kinds[which], self.held[which]
        name = (
            "run" if result is None else choose.choice(names_of_calls(kind, self.model, self.quick))
        )
        given = (jax.random.key(choose.randrange(3)), choose.choice(DATA), state, result)
        expected = answer_or_message(CALLS[name], self.reference(kind, name), given)
        answer = answer_or_message(CALLS[name], self.runners[which], given)
        require_equal(answer, expected, f"{where}: {name}")
        if name in HELD and not isinstance(answer, str):
            self.held[which] = (answer, result) if name == "init" else (answer.state, answer)


WALKS = int(os.environ.get("WALKS", "12"))  # the number for each pair of runners
# two runners of one kind need half the references
QUICK = (follows_latent, ("vi", "vi"), AutoNormal, True)
WALKERS = [
    (follows_argument, ("vi", "vi"), AutoNormal, False),
    (follows_argument, ("map", "vi"), AutoMultivariateNormal, False),
    (follows_latent, ("vi", "vi"), AutoMultivariateNormal, False),
    (follows_latent, ("map", "vi"), AutoNormal, False),
    (looks_at_values, ("map", "vi"), AutoNormal, False),
]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")  # data may not suit a state
@pytest.mark.parametrize(("model", "kinds", "guide", "quick"), [QUICK, *WALKERS])
def test_no_answer_depends_on_what_was_called_before(model, kinds, guide, quick):
    walker = Walker(model, kinds, guide(model), quick)
    for seed in range(4 if quick else WALKS):  # each walk goes on with the same runners
        choose = random.Random(seed)
        for number in range(CALLS_OF_A_WALK):
            walker.step(choose, f"call {number} of walk {seed}")

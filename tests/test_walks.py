"""Seeded random walks: every answer is that of the same call on a fresh runner, bit for bit."""

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


MODELS = [follows_argument, follows_latent, looks_at_values]
GUIDES = {
    (model, kind): kind(model) for model in MODELS for kind in (AutoNormal, AutoMultivariateNormal)
}  # shared by the runners of a walk


def make(kind, model, guide):
    if kind == "map":
        return EnsembleMAP(model, ADAM, ensemble_size=2)
    return EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)


def arrays(answer):
    """Return the arrays of an answer, keys as numbers."""
    if hasattr(answer, "groups") or hasattr(answer, "children"):
        return [np.asarray(v) for v in answer["posterior"].data_vars.values()]
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(answer)
    ]


def calls(model, concrete):
    """Give the calls of a walk: `call(runner, key, y, state, result) -> answer`."""
    options = {"progress_bar": False}
    own = {"member_args": [0]}

    def sampled(runner, key, y, state, result):
        if not isinstance(runner, EnsembleVI):
            return runner.get_params(result.state)
        return runner.sample_posterior(key, result, y, num_samples=2)

    def predicted(runner, key, y, state, result):
        if not isinstance(runner, EnsembleVI):
            return EnsemblePredictive(model, result)(key, y)
        return runner.get_params(result.state)

    def exported(runner, key, y, state, result):
        return to_arviz(runner, result, y, num_samples=2, log_likelihood=False)

    walk = {
        "init": lambda r, key, y, state, result: r.init(key, y),
        "run": lambda r, key, y, state, result: r.run(key, 2, y, **options),
        "concrete": lambda r, key, y, state, result: r.run(
            key, 2, y, jit_model_args=False, **options
        ),
        "go on": lambda r, key, y, state, result: r.run(key, 2, y, init_state=state, **options),
        "update": lambda r, key, y, state, result: r.update(state, y),
        "evaluate": lambda r, key, y, state, result: r.evaluate(state, y),
        "get_params": lambda r, key, y, state, result: r.get_params(state),
        "sample": sampled,
        "predict": predicted,
        "export": exported,
    }
    if not concrete:
        walk |= {
            "batches": lambda r, key, y, state, result: r.run(key, 2, y, batch_size=2, **options),
            "members": lambda r, key, y, state, result: r.run(
                key, 2, jnp.stack([y, y + 1.0]), **own, **options
            ),
            "jit": lambda r, key, y, state, result: jax.jit(r.update)(state, y),
            "jitted run": lambda r, key, y, state, result: jax.jit(
                lambda k, y: r.run(k, 2, y).params
            )(key, y),
        }
    return walk


def _answer(call, runner, given):
    """Return the answer, or the message of a ValueError."""
    try:
        return call(runner, *given)
    except ValueError as error:
        return str(error)


def walk(seed, num_calls):
    """Take one walk over two runners with a shared guide, and compare each answer."""
    choose = random.Random(seed)
    model = choose.choice(MODELS)
    guide = GUIDES[model, choose.choice([AutoNormal, AutoMultivariateNormal])]
    kinds = [choose.choice(["vi", "map"]), "vi"]
    runners = [make(kind, model, guide) for kind in kinds]
    steps = calls(model, model is looks_at_values)
    held = [None, None]  # a state and a result of each runner
    for number in range(num_calls):
        which = choose.randrange(2)
        name = "run" if held[which] is None else choose.choice(sorted(steps))
        key, y = jax.random.key(choose.randrange(3)), choose.choice(DATA)
        state, result = held[which] or (None, None)
        given = (key, y, state, result)
        fresh = _answer(steps[name], make(kinds[which], model, guide), given)
        answer = _answer(steps[name], runners[which], given)
        if isinstance(answer, str):  # data outside the support that a state has
            assert answer == fresh
            continue
        ours, theirs = arrays(answer), arrays(fresh)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_array_equal(a, b, err_msg=f"call {number} of walk {seed}: {name}")
        if name in ("run", "go on", "concrete", "batches"):
            held[which] = (answer.state, answer)
        elif name == "init":
            held[which] = (answer, result)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of data that do not suit a state
@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[] if s < 1 else pytest.mark.long) for s in range(16)]
)
def test_no_answer_depends_on_what_was_called_before(seed):
    walk(seed, 6 if seed < 1 else 12)

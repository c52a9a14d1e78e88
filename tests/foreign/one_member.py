"""A pytest plugin that replaces the `SVI` of a test suite by an ensemble of one member.

`pytest -p one_member` runs NumPyro's own tests with the plugin. A state is that of one fit: the
three fields of `SVIState` without a member axis, and the unchanged set-up of the start.
"""

import jax
import jax.numpy as jnp
import numpyro.infer
import numpyro.infer.svi
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.fit.state import plain, setup_of, with_setup


def _fields(state, change):
    changed = SVIState(*jax.tree.map(change, tuple(plain(state))))
    return with_setup(changed, setup_of(state))


def _stacked(state):
    return _fields(state, lambda leaf: jnp.asarray(leaf)[None])


def _single(state):
    return _fields(state, lambda leaf: leaf[0])


class OneMember(EnsembleVI):
    """An ensemble of one member with the interface of `SVI`."""

    def __init__(self, model, guide, optim, loss, **static_kwargs):
        super().__init__(model, guide, optim, loss, ensemble_size=1, **static_kwargs)

    def init(self, rng_key, *args, **kwargs):
        return _single(super().init(rng_key[None], *args, **kwargs))

    def get_params(self, svi_state):
        return jax.tree.map(lambda leaf: leaf[0], super().get_params(_stacked(svi_state)))

    def update(self, svi_state, *args, **kwargs):
        state, losses = super().update(_stacked(svi_state), *args, **kwargs)
        return _single(state), losses[0]

    def stable_update(self, svi_state, *args, **kwargs):
        state, losses = super().stable_update(_stacked(svi_state), *args, **kwargs)
        return _single(state), losses[0]

    def evaluate(self, svi_state, *args, **kwargs):
        return super().evaluate(_stacked(svi_state), *args, **kwargs)[0]

    def run(self, rng_key, num_steps, *args, init_state=None, **kwargs):
        if init_state is not None:
            kwargs["init_state"] = _stacked(init_state)
        result = super().run(rng_key[None], num_steps, *args, **kwargs)
        params = jax.tree.map(lambda leaf: leaf[0], result.params)
        return SVIRunResult(params, _single(result.state), result.losses[0])


def pytest_configure():
    numpyro.infer.SVI = numpyro.infer.svi.SVI = OneMember

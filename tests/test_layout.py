"""A density that is computed for a few chains at a time has the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ensemble.mcmc import layout

GROUP = np.array([0, 1, 1, 2, 0])


def density(z, data):
    """Return a log density whose gradient adds to indexed places."""
    return -0.5 * ((z[GROUP] - data) ** 2).sum() - 0.5 * (z**2).sum()


@pytest.mark.parametrize(
    "chains", [3, 17, *(pytest.param(n, marks=pytest.mark.long) for n in (6, 64))]
)
def test_the_layout_changes_no_number(chains, monkeypatch):
    taken = []
    mapped = jax.lax.map
    monkeypatch.setattr(jax.lax, "map", lambda fn, xs: taken.append(xs[0].shape) or mapped(fn, xs))
    z = jax.random.normal(jax.random.key(0), (chains, 3))
    data = jnp.arange(5.0)
    of_chains = jax.vmap(jax.value_and_grad(layout.laid_out(density)), (0, None))
    values, slopes = of_chains(z, data)
    if jax.default_backend() == "cpu":
        groups = {3: [], 6: [(2, 3, 3)], 17: [(5, 4, 3)], 64: [(16, 4, 3)]}
        assert taken == groups[chains]
    expected, gradients = jax.vmap(jax.value_and_grad(density), (0, None))(z, data)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, gradients, rtol=1e-5)


def test_forward_mode_is_intact():
    z, along, data = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, 0.5, -2.0]), jnp.arange(5.0)
    laid = layout.laid_out(density)
    expected = jax.jvp(lambda z: density(z, data), (z,), (along,))
    np.testing.assert_allclose(
        jax.jvp(lambda z: laid(z, data), (z,), (along,)), expected, rtol=1e-5
    )
    np.testing.assert_allclose(jax.jacfwd(laid)(z, data), jax.grad(density)(z, data), rtol=1e-5)
    hessian = jax.jacfwd(jax.grad(lambda z: laid(z, data)))(z)
    np.testing.assert_allclose(hessian, jax.hessian(density)(z, data), rtol=1e-5)

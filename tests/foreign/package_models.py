"""Models of other packages: forecasts and state spaces."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from cases import Case, Size
from numpyro.infer.reparam import LocScaleReparam

_T = np.arange(60)[:, None]
_NOISE = np.random.default_rng(0).normal(size=_T.shape)
SERIES = jnp.asarray(np.sin(2 * np.pi * _T / 12) + 0.01 * _T + 0.2 * _NOISE)
COVARIATES = jnp.asarray(np.concatenate([np.sin(_T / 2), np.cos(_T / 2)], axis=-1))


def local_level(covariates, data=None):
    """A random walk and a regression, made from the parts of numpyro_forecast."""
    from numpyro_forecast import Horizon, innovations, predict

    horizon = Horizon.from_data(covariates, data)
    weight = numpyro.sample("weight", dist.Normal(0.0, 0.5).expand([2]).to_event(1))
    drift_scale = numpyro.sample("drift_scale", dist.LogNormal(-3.0, 1.0))
    bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
    walk = dist.Normal(0.0, drift_scale)
    drift = innovations(horizon, "drift", walk, reparam=LocScaleReparam(0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-2.0, 1.0))
    mean = bias + jnp.cumsum(drift, axis=-2) + (covariates * weight).sum(-1, keepdims=True)
    predict(horizon, dist.StudentT(df=5.0, loc=0.0, scale=sigma), mean)


def forecast():
    return Case(local_level, (COVARIATES, SERIES), size=Size(32, 300, 300))


def filtered_level(times, values):
    """A level decays to zero and is observed with noise; a Kalman filter integrates it out."""
    import dynestyx
    from dynestyx.inference.filters import KFConfig

    walk_scale = numpyro.sample("walk_scale", dist.HalfNormal(1.0))
    decay = numpyro.sample("decay", dist.Beta(4.0, 2.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    one = jnp.ones((1, 1))
    dynamics = dynestyx.LTI_discrete(decay * one, walk_scale**2 * one, one, noise**2 * one)
    with dynestyx.Filter(filter_config=KFConfig()):
        dynestyx.sample("f", dynamics, obs_times=times, obs_values=values)


def state_space():
    # dynestyx imports this module inside the model; the import makes a key, which must not happen
    # inside a transformation
    importlib.import_module("cd_dynamax.dynamax.linear_gaussian_ssm.models")
    return Case(filtered_level, (jnp.arange(24.0), SERIES[:24]), size=Size(16, 150, 150))


CASES = {
    "dynestyx Kalman filter": ("dynestyx", state_space),
    "numpyro_forecast local level": ("numpyro_forecast", forecast),
}


def case(name):
    """Return the case of a package's model, or the reason why there is none."""
    package, build = CASES[name]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; it needs Python 3.12 or newer"
    return build()

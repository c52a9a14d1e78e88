"""More of NumPyro's examples: from `holt_winters` to `zero_inflated_poisson`."""

import jax.numpy as jnp
import numpy as np
import numpyro
from cases import SAMPLERS, Case, Size
from checkout import example
from numpyro.infer.autoguide import AutoBNAFNormal
from numpyro_examples import add, autoregression, regressors, rng

SMALL = Size(16, 150, 150)  # for models with gradients of milliseconds, or 766 latents


@add("holt_winters")
def holt_winters():
    t = np.arange(40)
    y = 0.05 * t + np.sin(2 * np.pi * t / 4) + 0.1 * rng().normal(size=40)
    return Case(example("holt_winters").holt_winters, (jnp.asarray(y), 4))


@add("horseshoe_regression normal")
def horseshoe():
    return Case(example("horseshoe_regression").model_normal_likelihood, regressors(40, 8))


@add("horseshoe_regression bernoulli")
def horseshoe_bernoulli():
    x, y = regressors(40, 8)
    model = example("horseshoe_regression").model_bernoulli_likelihood
    return Case(model, (x, (y > 0).astype(int)))


@add("hsgp")
def hsgp():
    days = np.arange(120)
    x = (days - days.mean()) / days.std()
    special = {f"{k}_days_indicator": days % 60 == i for i, k in enumerate(("memorial", "labour"))}
    options = {
        "day_of_week": days % 7,
        "day_of_year": days % 366,
        "thanksgiving_days_indicator": days % 60 == 30,
        "w0": days.std() * 2 * np.pi / 365.25,
        "L": 1.5 * x.max(),
        "M1": 5,
        "M2": 4,
        "M3": 3,
        "y": np.sin(2 * x) + 0.3 * (days % 7 > 4) + 0.2 * rng().normal(size=120),
    }
    model = example("hsgp").birthdays_model
    return Case(model, (x,), special | options, size=SMALL)


@add("mortality")
def mortality():
    age, space, time = (a.ravel() for a in np.indices((4, 3, 3)))
    population = np.full(age.size, 500)
    deaths = rng().binomial(population, 0.02 * (1 + age))
    lookup = np.array([0, 0, 1])
    return Case(example("mortality").model, (age, space, time, lookup, population, deaths))


@add("ode")
def ode():
    t = np.arange(10)
    y = np.stack([30 + 20 * np.sin(0.6 * t), 20 + 12 * np.cos(0.6 * t)], axis=-1)
    return Case(example("ode").model, (10, y), size=SMALL, reverse_only=True)


@add("hmcecs")
def hmcecs():
    data = rng().normal(size=(10, 4))
    outcomes = np.arange(10) % 3 > 0
    rows = dict.fromkeys(SAMPLERS, "plate 'N' takes 4 of its 10 rows")
    return Case(example("hmcecs").model, (data, outcomes, 4), refused=rows)


@add("neutra")
def neutra():
    model = example("neutra").dual_moon_model
    return Case(model, guide=AutoBNAFNormal(model, hidden_factors=[4, 4]))


@add("prodlda")
def prodlda():
    module = example("prodlda")
    docs = jnp.asarray(rng().poisson(0.7, size=(16, 20)))
    sizes = {"vocab_size": 20, "num_topics": 3, "hidden": 8, "dropout_rate": 0.2, "batch_size": 8}
    options = {"is_training": True}
    refused = {"ArviZ": "total_count_max"}  # the model's Multinomial has none
    # SGD: the gradient of a bias before batch normalisation is rounding, which Adam scales up
    return Case(
        module.model,
        (docs, sizes),
        options,
        guide=module.guide,
        optim=numpyro.optim.SGD(1e-3),
        refused=refused,
    )


@add("proportion_test")
def proportion_test():
    x, y = regressors(60, 3)
    return Case(example("proportion_test").model, (jnp.asarray(x), y > 0))


@add("sparse_regression")
def sparse_regression():
    hypers = {"expected_sparsity": 2.0, "alpha3": 2.0, "c": 1.0}
    hypers |= {"alpha1": 3.0, "beta1": 1.0, "alpha2": 3.0, "beta2": 1.0}
    return Case(example("sparse_regression").model, (*regressors(20, 5), hypers))


@add("ssbvm_mixture")
def ssbvm_mixture():
    angles = rng().vonmises([1.0, -1.0], 4.0, size=(30, 2))
    model = example("ssbvm_mixture").ss_model
    return Case(model, (angles, 30, 2), enumerated=True, size=SMALL)


@add("stochastic_volatility")
def stochastic_volatility():
    return Case(example("stochastic_volatility").model, (0.02 * rng().standard_t(5, size=60),))


@add("thompson_sampling")
def thompson_sampling():
    x = np.linspace(-2, 2, 15)
    return Case(example("thompson_sampling").model, (x, np.sin(3 * x)))


@add("ucbadmit")
def ucbadmit():
    dept, male = np.repeat(np.arange(6), 2), np.tile([0, 1], 6)
    applications = rng().integers(50, 400, size=12)
    admit = rng().binomial(applications, 0.6 - 0.09 * dept)
    return Case(example("ucbadmit").glmm, (dept, male, applications, admit))


@add("vae")
def vae():
    module = example("vae")
    images = (rng().uniform(size=(8, 16)) < 0.4).astype(float)
    sizes = {"hidden_dim": 8, "z_dim": 3}
    return Case(module.model, (images,), sizes, guide=module.guide)


@add("cvae")
def cvae():
    module = example("cvae-flax/models")
    images = (rng().uniform(size=(4, 28, 28)) < 0.4).astype(float)
    return Case(module.cvae_model, (images[:, 14:, :14], images), guide=module.cvae_guide)


@add("var2")
def var2():
    y = np.stack([autoregression(25), autoregression(25)[::-1]], axis=-1)
    return Case(example("var2").var2_scan, (y,))


@add("zero_inflated_poisson")
def zero_inflated_poisson():
    x, _ = regressors(60, 3)
    counts = rng().poisson(np.exp(0.5 * x[:, 0])) * rng().integers(0, 2, size=60)
    return Case(example("zero_inflated_poisson").model, (jnp.asarray(x), counts))

"""Discrete latents that are summed out: densities, kernels, starts and MAP."""

import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, enum, infer_discrete, log_density, markov
from numpyro.infer import MCMC, Predictive
from numpyro.infer.util import constrain_fn, initialize_model
from numpyro.primitives import Messenger

from numpyro_ensemble import EnsembleMAP, Pathfinder, log_joint, reweight
from numpyro_ensemble.density import model_sites
from numpyro_ensemble.mcmc import MEADS, ChEES, starts
from numpyro_ensemble.mcmc.target import Target

pytestmark = pytest.mark.promotes_ranks  # enumerated values have axes of their own

SUM = {"enumerate": "parallel"}  # one dict for many sites
Y = np.array([-2.2, 1.1, 0.7, -1.4, 2.0, -1.9, 1.6, 0.4])


# Models, with sites in no alphabetical order, and scalars beside vectors --------------------------


def mixture(y, summed=True):
    weights = numpyro.sample("weights", dist.Dirichlet(2 * jnp.ones(2)))
    low = numpyro.sample("low", dist.Normal(-2.0, 1.0))
    gap = numpyro.sample("gap", dist.Gamma(3.0, 1.0))
    loc = numpyro.deterministic("loc", jnp.stack([low, low + gap]))
    with numpyro.plate("rows", len(y)):
        if summed:
            kind = numpyro.sample("kind", dist.Categorical(weights), infer=SUM)
            numpyro.deterministic("at", loc[kind])
            numpyro.sample("y", dist.Normal(loc[kind], 1.0), obs=y)
        else:
            parts = dist.Categorical(weights), dist.Normal(loc, 1.0)
            numpyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)


def unmarked(y):
    rate = numpyro.sample("rate", dist.Beta(2.0, 1.0))
    on = numpyro.sample("on", dist.Bernoulli(rate))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(on, 1.0), obs=y)


def raters(votes):
    """Items of unknown classes, rated by people who err, in nested plates."""
    items, people = votes.shape
    with numpyro.plate("people", people, dim=-2), numpyro.plate("classes", 3):
        errors = numpyro.sample("errors", dist.Dirichlet(jnp.ones(3)))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("items", items, dim=-2):
        item = numpyro.sample("item", dist.Categorical(share), infer=SUM)
        with numpyro.plate("votes", people, dim=-1):
            numpyro.sample("vote", dist.Categorical(errors[jnp.arange(people), item]), obs=votes)


def two_levels(y):
    """Discrete latents in a plate, which depend on a discrete latent outside it."""
    width = numpyro.sample("width", dist.HalfNormal(1.0))
    odds = numpyro.sample("odds", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    season = numpyro.sample("season", dist.Bernoulli(0.4), infer=SUM)
    with numpyro.plate("rows", len(y)):
        on = numpyro.sample("on", dist.Bernoulli(logits=odds[season]), infer=SUM)
        numpyro.sample("y", dist.Normal(3.0 * on, width), obs=y)


def spikes(x, y):
    """Continuous latents whose prior depends on discrete ones."""
    with numpyro.plate("columns", x.shape[1]):
        used = numpyro.sample("used", dist.Bernoulli(0.3), infer=SUM)
        slope = numpyro.sample("slope", dist.Normal(0.0, jnp.where(used == 1, 2.0, 0.1)))
    numpyro.sample("y", dist.Normal(x @ slope, 1.0).to_event(1), obs=y)


def hidden_states(y):
    moves = numpyro.sample("moves", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    loc = numpyro.sample("loc", dist.Normal(jnp.zeros(2), 3.0).to_event(1))

    def step(state, y):
        state = numpyro.sample("state", dist.Categorical(moves[state]), infer=dict(SUM))
        numpyro.sample("y", dist.Normal(loc[state], 1.0), obs=y)
        return state, None

    scan(step, 0, y)


def hidden_states_unrolled(y):
    moves = numpyro.sample("moves", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    loc = numpyro.sample("loc", dist.Normal(jnp.zeros(2), 3.0).to_event(1))
    state = 0
    for t in markov(range(len(y))):
        state = numpyro.sample(f"state_{t}", dist.Categorical(moves[state]), infer=dict(SUM))
        numpyro.sample(f"y_{t}", dist.Normal(loc[state], 1.0), obs=y[t])


def tempered(y):
    return reweight(mixture, prior=0.5, likelihood=2.0)(y)


VOTES = np.random.default_rng(0).integers(0, 3, size=(6, 4))
X = np.random.default_rng(1).normal(size=(5, 3))
MODELS = {
    "mixture": (mixture, (Y,), 1),
    "unmarked": (unmarked, (Y,), 1),
    "raters": (raters, (VOTES,), 2),
    "two levels": (two_levels, (Y,), 1),
    "spikes": (spikes, (X, X[:, 0]), 1),
    "scan": (hidden_states, (Y,), 0),
    "markov": (hidden_states_unrolled, (Y[:4],), 0),
    "tempered": (tempered, (Y,), 1),
}
NAMES = {  # the continuous latents, in the model's order
    "mixture": ("weights", "low", "gap"),
    "unmarked": ("rate",),
    "raters": ("errors", "share"),
    "two levels": ("width", "odds"),
    "spikes": ("slope",),
    "scan": ("moves", "loc"),
    "markov": ("moves", "loc"),
    "tempered": ("weights", "low", "gap"),
}


def tolerance():
    return {"rtol": 1e-10} if jax.config.jax_enable_x64 else {"rtol": 2e-5, "atol": 2e-5}


def each_of(*quick, without=()):
    """Yield the models' names; those that are not in `quick` are left to `make long`."""
    for name in MODELS:
        if name not in without:
            yield pytest.param(name, marks=[] if name in quick else pytest.mark.long)


class own_infer(Messenger):  # noqa: N801
    """Copy each site's `infer`, so that NumPyro does not write into the dict that sites share."""

    def process_message(self, msg):
        if msg["type"] == "sample":
            msg["infer"] = dict(msg["infer"])


def as_nuts_warns(name):
    if name == "unmarked":
        return pytest.warns(FutureWarning, match="enumerated sites need to be marked")
    return nullcontext()


# Densities ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", [*each_of("two levels")])
def test_the_density_is_that_of_nuts(name, key):
    model, args, _ = MODELS[name]
    target = Target(model)
    assert target.latent_names(args, {}) == NAMES[name]
    with as_nuts_warns(name):
        info = initialize_model(key, own_infer(model), model_args=args)
    z = info.param_info.z
    ours = jax.jit(jax.value_and_grad(target.log_density(args, {})))(z)
    theirs = jax.jit(jax.value_and_grad(info.potential_fn))(z)
    jax.tree.map(lambda a, b: assert_allclose(a, -b, **tolerance()), ours, theirs)
    smooth = jax.jit(target.smooth_density(args, {}))(z)
    assert_allclose(smooth, ours[0], **tolerance())
    assert SUM == {"enumerate": "parallel"}  # the user's dict is unchanged


@pytest.mark.parametrize("name", [*each_of("spikes", without=["unmarked"])])
def test_likelihood_and_prior_add_up_to_numpyros_density(name, key):
    model, args, plates = MODELS[name]
    z = initialize_model(key, own_infer(model), model_args=args).param_info.z
    params = constrain_fn(handlers.seed(model, key), args, {}, z)
    likelihood, prior = jax.jit(log_joint(model))(params, *args)
    summed = enum(config_enumerate(own_infer(model)), -plates - 1)
    assert_allclose(likelihood + prior, log_density(summed, args, {}, params)[0], **tolerance())
    assert abs(float(likelihood)) > 0.1 and abs(float(prior)) > 0.1
    assert SUM == {"enumerate": "parallel"}


@pytest.mark.core
def test_the_parts_of_a_mixture_are_those_of_its_marginal_form():
    params = {"weights": jnp.array([0.3, 0.7]), "low": -1.5, "gap": 2.0}
    density = jax.jit(log_joint(mixture), static_argnums=2)
    ours, by_hand = (density(params, Y, summed) for summed in (True, False))
    assert_allclose(ours, by_hand, rtol=1e-5)
    kinds = {"kind": jnp.array([0, 1, 1, 0, 1, 0, 1, 1])}
    joint = density(params | kinds, Y)  # a site with a value is not summed out
    terms = jnp.log(params["weights"])[kinds["kind"]].sum()
    assert_allclose(joint[1], by_hand[1] + terms, rtol=1e-5)
    assert_allclose(jax.jit(log_joint(handlers.seed(mixture, 0)))(params, Y), by_hand, rtol=1e-5)


def test_a_prior_that_depends_on_discrete_latents_is_their_sum():
    slope = jnp.array([0.1, -0.5, 2.0])
    ours = log_joint(spikes)({"slope": slope}, X, X[:, 0])
    wide, narrow = (dist.Normal(0.0, s).log_prob(slope) for s in (2.0, 0.1))
    prior = jnp.logaddexp(np.log(0.3) + wide, np.log(0.7) + narrow).sum()
    likelihood = dist.Normal(X @ slope, 1.0).log_prob(X[:, 0]).sum()
    assert_allclose(ours, (likelihood, prior), **tolerance())


def test_a_hidden_markov_model_has_the_likelihood_of_the_forward_algorithm():
    params = {"moves": jnp.array([[0.9, 0.1], [0.3, 0.7]]), "loc": jnp.array([-1.0, 2.0])}
    forward, total = np.array([1.0, 0.0]), 0.0
    for y in Y:
        forward = forward @ params["moves"] * np.exp(dist.Normal(params["loc"], 1.0).log_prob(y))
        total, forward = total + np.log(forward.sum()), forward / forward.sum()
    for model in (hidden_states, hidden_states_unrolled):
        assert_allclose(jax.jit(log_joint(model))(params, Y)[0], total, **tolerance())


@pytest.mark.long
def test_deterministic_sites_that_depend_on_discrete_ones_are_left_out(key):
    target = Target(mixture)
    z, valid = target.initial(jax.random.split(key, 3), (Y,), {})
    assert bool(valid.all())
    sites = jax.jit(jax.vmap(target.constrain((Y,), {})))(z)
    assert set(sites) == {"weights", "low", "gap", "loc"}
    assert_allclose(sites["loc"][:, 1], sites["low"] + sites["gap"], **tolerance())


def test_the_sites_of_a_model_know_what_is_marked():
    sites = model_sites(mixture, (Y,), {})
    assert (sites["kind"].kind, sites["kind"].marked, sites["kind"].not_summed) == (
        "discrete", True, "",
    )  # fmt: skip
    assert not model_sites(unmarked, (Y,), {})["on"].marked


# Chains -------------------------------------------------------------------------------------------

RATIOS = np.array([0.2, 3.0, 8.0, 0.5, 6.0, 4.0])  # each switch: likelihood of 1 over that of 0


def switches(ratios=RATIOS):
    """Switches that share one probability of being on; `truth` has the posterior on a grid."""
    rate = numpyro.sample("rate", dist.Beta(1.0, 2.0))
    with numpyro.plate("rows", len(ratios)):
        on = numpyro.sample("on", dist.Bernoulli(rate), infer=dict(SUM))
        numpyro.factor("seen", on * jnp.log(ratios))


def truth():
    """Return mean and standard deviation of the rate, and each switch's probability of being on."""
    rate = (np.arange(4000) + 0.5) / 4000
    each = 1 - rate[:, None] + rate[:, None] * RATIOS
    weights = (1 - rate) * each.prod(1)
    weights /= weights.sum()
    mean = weights @ rate
    on = weights @ (rate[:, None] * RATIOS / each)
    return mean, np.sqrt(weights @ (rate - mean) ** 2), on


def drawn(kernel, key, num_samples=120):
    mcmc = MCMC(
        kernel, num_warmup=100, num_samples=num_samples, num_chains=64, progress_bar=False,
        chain_method="vectorized",
    )  # fmt: skip
    mcmc.run(key, RATIOS)
    return mcmc


def is_true(rate):
    """Return whether draws `(C, N)` have the grid's moments, within errors of the chains' means."""
    mean, sd, _ = truth()
    means, squares = rate.mean(1), ((rate - mean) ** 2).mean(1)
    errors = [x.std(ddof=1) / np.sqrt(len(x)) for x in (means, squares)]
    gaps = abs(means.mean() - mean), abs(squares.mean() - sd**2)
    return all(gap < 4.5 * error for gap, error in zip(gaps, errors, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("kernel", [ChEES, MEADS])
def test_chains_draw_from_the_marginal_and_switches_are_inferred(kernel, key):
    mcmc = drawn(kernel(switches, start="init"), key)
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(samples) == {"rate"}
    rate = np.asarray(samples["rate"])
    assert is_true(rate)
    off = np.random.default_rng(0).beta(1, 2 + len(RATIOS), size=rate.shape)
    assert not is_true(off)  # draws given that all switches are off
    flat = mcmc.get_samples()
    on = Predictive(switches, flat, infer_discrete=True)(jax.random.key(1), RATIOS)["on"]
    error = 4 * np.sqrt(0.25 / 600)  # of 600 independent draws
    assert np.abs(np.asarray(on).mean(0) - truth()[2]).max() < error
    most = infer_discrete(
        handlers.substitute(switches, {"rate": flat["rate"].mean()}), first_available_dim=-2,
        temperature=0,
    )  # fmt: skip
    likely = handlers.trace(handlers.seed(most, 0)).get_trace(RATIOS)["on"]["value"]
    assert likely.tolist() == (truth()[2] > 0.5).astype(int).tolist()


@pytest.mark.long
def test_a_second_run_with_other_data_compiles_no_start(key, compile_count):
    kernel = ChEES(switches, start="init")
    keys = jax.random.split(key, 8)
    kernel.init(keys, 10, None, (RATIOS,), {})
    with compile_count() as count:
        kernel.init(keys, 10, None, (RATIOS + 1.0,), {})
    assert count.count == 0, count.names


@pytest.mark.long
@pytest.mark.parametrize("start", ["nuts", "pathfinder"])
def test_the_starts_of_models_with_sums(start, key):
    find = starts.from_nuts if start == "nuts" else starts.from_pathfinder
    z = find(key, mixture, 64, Y)
    assert {name: x.shape for name, x in z.items()} == {
        "weights": (64, 1), "low": (64,), "gap": (64,),
    }  # fmt: skip
    values = jax.jit(jax.vmap(Target(mixture).log_density((Y,), {})))(z)
    at_random = Target(mixture).initial(jax.random.split(key, 64), (Y,), {})[0]
    others = jax.jit(jax.vmap(Target(mixture).log_density((Y,), {})))(at_random)
    assert np.median(values) > np.median(others) + 1.0


@pytest.mark.long
def test_pathfinder_sums(key):
    result = Pathfinder(mixture, num_paths=4).run(key, Y, num_samples=200)
    by_hand = Pathfinder(mixture, num_paths=4).run(key, Y, summed=False, num_samples=200)
    assert set(result.samples) == {"weights", "low", "gap", "loc"}
    assert_allclose(result.elbo, by_hand.elbo, rtol=1e-4)


# MAP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prior_weight": 0.3}, id="weighed"),
        pytest.param({}, id="plain", marks=pytest.mark.long),
        pytest.param({"prior_weight": 0}, id="likelihood", marks=pytest.mark.long),
        pytest.param({"jacobian": True}, id="jacobian", marks=pytest.mark.long),
    ],
)
def test_map_is_that_of_the_marginal_form(options, key):
    adam = numpyro.optim.Adam(0.05)
    fits = [
        EnsembleMAP(mixture, adam, ensemble_size=2, **options).run(
            key, 30, Y, summed, progress_bar=False
        )
        for summed in (True, False)
    ]
    loose = {"rtol": 1e-8} if jax.config.jax_enable_x64 else {"rtol": 1e-3}
    assert_allclose(fits[0].losses, fits[1].losses, **loose)
    assert set(fits[0].params) == {"weights", "low", "gap"}
    for name, value in fits[0].params.items():
        assert_allclose(value, fits[1].params[name], **loose)


@pytest.mark.long
def test_batches_of_rows_that_are_summed_out(key):
    fits = [
        EnsembleMAP(mixture, numpyro.optim.Adam(0.05), ensemble_size=2).run(
            key, 12, Y, summed, batch_size=4, progress_bar=False
        )
        for summed in (True, False)
    ]
    assert_allclose(fits[0].losses, fits[1].losses, rtol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("name", ["raters", "two levels", "spikes", "scan"])
def test_modes_are_where_numpyros_density_is_flat(name, key):
    model, args, plates = MODELS[name]
    runner = EnsembleMAP(model, ensemble_size=2, jacobian=True)
    result = runner.run(key, 400, *args, progress_bar=False)
    info = initialize_model(key, own_infer(model), model_args=args)
    seeded = handlers.seed(model, key)
    for member in range(2):
        params = {k: v[member] for k, v in result.params.items()}
        z = numpyro.infer.util.unconstrain_fn(seeded, args, {}, params)
        slope = jax.tree.leaves(jax.grad(info.potential_fn)(z))
        assert max(float(jnp.abs(x).max()) for x in slope) < 1e-4


# Refusals -----------------------------------------------------------------------------------------


def latent(fn, **options):
    def model():
        z = numpyro.sample("z", fn, **options)
        numpyro.sample("mu", dist.Normal(jnp.sum(z), 1.0))

    return model


REFUSED = {
    "infinite": (latent(dist.Poisson(2.0)), "'z' is discrete .Poisson.*cannot be enumerated"),
    "array": (latent(dist.Bernoulli(jnp.ones(3) / 2).to_event(1)), "is an array.*use a plate"),
    "offset": (latent(dist.DiscreteUniform(3, 5)), "lowest value is not 0"),
    "sequential": (latent(dist.Bernoulli(0.5), infer={"enumerate": "sequential"}), "'sequential'"),
}


@pytest.mark.filterwarnings("ignore:Out-of-support")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_summed_out_is_refused(name, key):
    model, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ChEES(model).init(jax.random.split(key, 8), 10)
    with pytest.raises(ValueError, match=message):
        EnsembleMAP(model, ensemble_size=2).run(key, 3, progress_bar=False)


def test_missing_plates_scans_and_models_with_nothing_left(key):
    keys = jax.random.split(key, 8)

    def no_plate(y):
        rate = numpyro.sample("rate", dist.Beta(1.0, 1.0))
        on = numpyro.sample("on", dist.Bernoulli(rate).expand([len(y)]), infer=SUM)
        numpyro.sample("y", dist.Normal(on, 1.0), obs=y)

    def in_scan(y):
        def step(on, y):
            level = numpyro.sample("level", dist.HalfNormal(1.0))
            on = numpyro.sample("on", dist.Bernoulli(0.3 + 0.2 * on), infer=dict(SUM))
            numpyro.sample("y", dist.Normal(on, level), obs=y)
            return on, None

        scan(step, 0, y)

    def discrete():
        numpyro.sample("z", dist.Bernoulli(0.5), infer=SUM)

    with pytest.raises(ValueError, match="Missing a plate statement for batch dimension -1"):
        ChEES(no_plate).init(keys, 10, None, (Y,), {})
    with pytest.raises(ValueError, match="'level' is drawn in a scan .*HalfNormal.*before the"):
        ChEES(in_scan).init(keys, 10, None, (Y,), {})
    with pytest.raises(ValueError, match="'level' is drawn in a scan .*HalfNormal.*before the"):
        EnsembleMAP(in_scan, ensemble_size=2).run(key, 3, Y, progress_bar=False)
    with pytest.raises(ValueError, match=r"\['z'\] are all discrete.*nothing to sample"):
        ChEES(discrete).init(keys, 10)
    with pytest.raises(ValueError, match=r"\['z'\] are all discrete.*nothing to fit"):
        EnsembleMAP(discrete, ensemble_size=2).run(key, 3, progress_bar=False)


def test_what_map_refuses(key):
    def subsampled(y):
        rate = numpyro.sample("rate", dist.Beta(1.0, 1.0))
        with numpyro.plate("rows", len(y), subsample_size=4) as rows:
            on = numpyro.sample("on", dist.Bernoulli(rate), infer=SUM)
            numpyro.sample("y", dist.Normal(on, 1.0), obs=y[rows])

    def run(model, *args, **options):
        adam = numpyro.optim.Adam(0.1)
        EnsembleMAP(model, adam, ensemble_size=2).run(key, 3, *args, progress_bar=False, **options)

    with pytest.raises(ValueError, match="'on' is discrete .*mark it infer=.*config_enumerate"):
        run(unmarked, Y)
    with pytest.raises(ValueError, match=r"'rows' takes 4 of its 8 .*\['on'\] out.*batch_size="):
        run(subsampled, jnp.asarray(Y))
    with pytest.raises(ValueError, match="discrete site 'season', which is in no plate"):
        run(two_levels, Y, batch_size=4)


def test_without_funsor(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "funsor", None)
    with pytest.raises(ImportError, match=r"\['kind'\] are discrete.*pip install funsor"):
        ChEES(mixture).init(jax.random.split(key, 8), 10, None, (Y,), {})
    with pytest.raises(ImportError, match="pip install funsor"):
        EnsembleMAP(mixture, ensemble_size=2).run(key, 3, Y, progress_bar=False)
    params = {"weights": jnp.array([0.3, 0.7]), "low": -1.5, "gap": 2.0}
    with pytest.raises(ImportError, match="pip install funsor"):
        log_joint(mixture)(params, Y)

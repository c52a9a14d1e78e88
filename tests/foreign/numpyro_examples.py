"""The models of NumPyro's examples, on small data of our own."""

from argparse import Namespace

import jax.numpy as jnp
import numpy as np
from cases import SAMPLERS, Case
from checkout import example, folder

CASES = {}  # by name of an example, the function that builds its case


def add(name):
    def keep(build):
        CASES[name] = build
        return build

    return keep


def case(name):
    """Return the case of one example, or the reason why there is none."""
    where = folder()
    return where if isinstance(where, str) else CASES[name]()


def rng():
    return np.random.default_rng(0)


def regressors(rows=40, columns=3):
    x = rng().normal(size=(rows, columns))
    return x, x @ np.linspace(1.0, -1.0, columns) + 0.3 * rng().normal(size=rows)


def annotations():
    """Forty items of three classes, each rated once by each of five people, who mostly agree."""
    truth = rng().integers(0, 3, size=(40, 1))
    wrong = rng().uniform(size=(40, 5)) < 0.2
    return np.arange(5), np.where(wrong, (truth + 1) % 3, truth)


def annotation(model, *args):
    return Case(getattr(example("annotation"), model), args, enumerated=True)


for _name in ("multinomial", "item_difficulty"):
    add(f"annotation {_name}")(lambda name=_name: annotation(name, annotations()[1]))
for _name in ("dawid_skene", "mace", "hierarchical_dawid_skene", "logistic_random_effects"):
    add(f"annotation {_name}")(lambda name=_name: annotation(name, *annotations()))


def autoregression(length=40):
    y = np.zeros(length)
    for t, shock in enumerate(rng().normal(size=length)):
        y[t] = 0.5 * y[t - 1] - 0.2 * y[t - 2] + 0.3 * shock
    return jnp.asarray(y)  # models index it inside a scan


@add("ar2 scan")
def ar2_scan():
    return Case(example("ar2").ar2_scan, (autoregression(),))


@add("ar2 for loop")
def ar2_for_loop():
    return Case(example("ar2").ar2_for_loop, (autoregression(20),))


def batting():
    at_bats = np.full(12, 45)
    return at_bats, rng().binomial(at_bats, rng().beta(20, 50, size=12))


def baseball(model):
    return Case(getattr(example("baseball"), model), batting())


for _name in ("fully_pooled", "not_pooled", "partially_pooled", "partially_pooled_with_logit"):
    add(f"baseball {_name}")(lambda name=_name: baseball(name))


@add("bnn")
def bnn():
    x, y = regressors(30)
    return Case(example("bnn").model, (x, np.tanh(y)[:, None], 4))


def captures(animals=30, times=5):
    seen = rng().uniform(size=(animals, times)) < 0.6
    return seen.astype(int), rng().integers(0, 2, size=animals)


def capture_recapture(number):
    model = getattr(example("capture_recapture"), f"model_{number}")
    refused = {}
    if number == 2:  # NUTS fails too
        refused |= dict.fromkeys(("MAP", *SAMPLERS), "'phi' is drawn in a scan")
    if number in (1, 4):  # NumPyro's single fits are not finite either
        refused |= dict.fromkeys(("Predictive", "ArviZ"), "members are not finite")
    return Case(model, captures(), enumerated=True, single=True, refused=refused)


for _number in range(1, 6):
    add(f"capture_recapture {_number}")(lambda number=_number: capture_recapture(number))


@add("covtype")
def covtype():
    x, y = regressors(60, 5)
    return Case(example("covtype").model, (jnp.asarray(x), jnp.asarray(y > 0)))


@add("covtype subsampled")
def covtype_subsampled():
    x, y = regressors(60, 5)
    data = jnp.asarray(x), jnp.asarray(y > 0)
    refused = dict.fromkeys(SAMPLERS, "at random")
    return Case(example("covtype").model, (*data, 20), refused=refused)


@add("dais_demo")
def dais_demo():
    return Case(example("dais_demo").model, (np.linspace(-1, 1, 16), np.arange(16) % 3 > 0))


@add("funnel")
def funnel():
    return Case(example("funnel").model)


@add("funnel decentred")
def funnel_decentred():
    return Case(example("funnel").reparam_model)


@add("gp")
def gp():
    x = np.linspace(-1, 1, 25)
    return Case(example("gp").model, (x, np.sin(4 * x) + 0.1 * rng().normal(size=25)))


@add("hmm")
def hmm():
    words = rng().integers(0, 5, size=40)
    states = np.arange(12) % 3
    data = np.ones(3), np.full(5, 0.5), states, words[:12], words[12:]
    return Case(example("hmm").semi_supervised_hmm, data)


def hmm_enum(number):
    sequences = (rng().uniform(size=(3, 6, 4)) < 0.4).astype(int)
    args = sequences, np.array([6, 5, 4]), Namespace(hidden_dim=4)
    model = getattr(example("hmm_enum"), f"model_{number}")
    options = {"include_prior": True}
    return Case(model, args, options, enumerated=True, single=True)


for _number in (1, 2, 3, 4, 6):
    add(f"hmm_enum {_number}")(lambda number=_number: hmm_enum(number))

"""Equality of values, and the data that a function takes from its surroundings."""

import array
import collections
import contextvars
import dataclasses
import enum
import functools
import os
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
import xarray
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from zoo import NNX

from numpyro_ensemble import EnsembleMAP, EnsembleVI, reweight
from numpyro_ensemble.calls.identity import closure_fingerprint, fingerprint, is_unknown


class Link(enum.Enum):
    LOG = "log"
    IDENTITY = "identity"


ZEROS = np.zeros((2, 3))
KEY = jax.random.key(0)

EQUAL = {
    "an array and its copy": (ZEROS, ZEROS.copy()),
    "a transpose and its copy": (ZEROS.T, ZEROS.T.copy(order="C")),
    "NaN in an array": (np.array([np.nan]), np.array([np.nan])),
    "NaN": (float("nan"), float("nan")),
    "complex NaN": (complex("nan"), complex("nan")),
    "two jax arrays": (jnp.arange(3), jnp.arange(3)),
    "bfloat16": (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)),
    "typed keys": (KEY, jax.random.key(0)),
    "strings": ("abc", "".join("abc")),
    "text": (np.array(["a", "b"]), np.array(["a", "b"])),
    "dates": (np.array("2020-01-01", "M8[D]"), np.array("2020-01-01", "M8[D]")),
    "empty arrays": (np.zeros((0, 2)), np.zeros((0, 2))),
    "None": (None, None),
    "a member of an enum": (Link.LOG, Link("log")),
    "a class": (dist.Normal, dist.Normal),
    "a dtype": (np.dtype("f4"), np.dtype(np.float32)),
    "a function": (len, len),
    "a jitted function": (jnp.exp, jnp.exp),
    "an activation": (jax.nn.relu, jax.nn.relu),
    "a NumPy scalar and an array": (np.float32(1.0), np.array(1.0, np.float32)),
}

DIFFERENT = {
    "values": (ZEROS, ZEROS + 1.0),
    "shapes": (ZEROS, ZEROS.reshape(3, 2)),
    "shapes of nothing": (np.zeros((0, 2)), np.zeros((2, 0))),
    "dtypes": (ZEROS, ZEROS.astype(np.float32)),
    "equal bytes": (np.zeros(2, np.int32), np.zeros(2, np.float32)),
    "byte orders": (np.zeros(2, "<f8"), np.zeros(2, ">f8")),
    "numpy and jax": (np.zeros(2, np.float32), jnp.zeros(2, jnp.float32)),
    "weak types": (jnp.asarray(1.0), jnp.asarray(np.asarray(1.0, jnp.asarray(1.0).dtype))),
    "1 and 1.0": (1, 1.0),
    "1 and True": (1, True),
    "1 and a NumPy 1": (1, np.int64(1)),
    "signs of zero": (0.0, -0.0),
    "signs of zero in arrays": (np.array(0.0), np.array(-0.0)),
    "signs of a complex zero": (complex(0.0, 0.0), complex(0.0, -0.0)),
    "text": (np.array(["a"]), np.array(["b"])),
    "a string and bytes": ("a", b"a"),
    "members of an enum": (Link.LOG, Link.IDENTITY),
    "classes": (dist.Normal, dist.Cauchy),
    "functions": (jnp.exp, jnp.tanh),
    "keys": (KEY, jax.random.key(1)),
    "a key and its data": (KEY, jax.random.key_data(KEY)),
    "kinds of keys": (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg")),
    "masks": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 1])),
}


@pytest.mark.core
@pytest.mark.parametrize("case", EQUAL)
def test_equal_contents_have_one_fingerprint(case):
    a, b = EQUAL[case]
    assert fingerprint(a) == fingerprint(b)
    assert hash(fingerprint(a)) == hash(fingerprint(b))


@pytest.mark.core
@pytest.mark.parametrize("case", DIFFERENT)
def test_other_contents_have_another(case):
    a, b = DIFFERENT[case]
    assert fingerprint(a) != fingerprint(b)


def test_an_array_changed_in_place_is_another():
    array = np.zeros(3)
    before = fingerprint(array)
    array[1] = 1.0
    assert fingerprint(array) != before
    array[1] = 0.0
    assert fingerprint(array) == before


@pytest.mark.parametrize(
    "opaque",
    [
        weakref.ref(object),
        types.SimpleNamespace(a=1),
        np.array([None]),
        np.zeros(1, [("a", object)]),
        np.zeros(1, [("a", object)])[0],
    ],
    ids=["reference", "namespace", "objects", "structured objects", "a row of objects"],
)
def test_what_has_no_contents_equals_nothing(opaque):
    assert fingerprint(opaque) != fingerprint(opaque)


# What a function takes from its surroundings --------------------------------------------------

DATA = None  # rebound by the tests below


def direct():
    return DATA


def two_levels_up():
    return direct()


def three_levels_up():
    return [two_levels_up() for _ in range(1)]


def noticed(fn, rebind):
    """Return whether a rebinding changes a function's fingerprint, which is stable without it."""
    before = closure_fingerprint(fn)
    assert closure_fingerprint(fn) == before
    hash(before)
    rebind()
    return closure_fingerprint(fn) != before


REBOUND = {
    "number": (1.0, 2.0),
    "types": (1, 1.0),
    "NumPy float": (np.float32(1.0), np.float32(2.0)),
    "NumPy integer": (np.int64(1), np.int64(2)),
    "array": (np.zeros(2), np.ones(2)),
    "None": (None, np.ones(2)),
    "jax array": (jnp.zeros(2), jnp.ones(2)),
    "key": (KEY, jax.random.key(1)),
    "string": ("a", "b"),
    "enum": (Link.LOG, Link.IDENTITY),
    "distribution class": (dist.Normal, dist.Cauchy),
    "distribution": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)),
    "module": (NNX, jax.tree.map(lambda leaf: leaf + 1.0, NNX)),
    "link": (jnp.exp, jax.nn.softplus),
    "helper": (lambda x: x, lambda x: 2 * x),
    "list": ([np.zeros(2)], [np.ones(2)]),
    "keys of a dict": ({"a": 1.0}, {"b": 1.0}),
    "values of a dict": ({"a": 1.0}, {"a": 2.0}),
    "nesting": ([[1], 2], [[1, 2]]),
    "range": (range(2), range(3)),
}


@pytest.mark.parametrize("fn", [direct, two_levels_up, three_levels_up])
@pytest.mark.parametrize("case", REBOUND)
def test_a_rebound_global_is_noticed(case, fn, monkeypatch):
    old, new = REBOUND[case]
    monkeypatch.setitem(globals(), "DATA", old)
    assert noticed(fn, lambda: monkeypatch.setitem(globals(), "DATA", new))


def test_a_closed_over_array_changed_in_place_is_noticed():
    array = np.zeros(2)
    held = {"rows": [array]}

    def model():
        return array.sum()

    def deeper():
        return held["rows"]

    def change():
        array[0] += 1.0

    for fn in (model, deeper, lambda: model()):
        assert noticed(fn, change)


def test_a_rebound_variable_of_the_enclosing_function_is_noticed():
    shift = 0.0

    def model():
        return shift

    def change():
        nonlocal shift
        shift = 1.0

    assert noticed(model, change)


def test_a_cell_that_is_still_empty_is_no_error():
    def model():
        return later

    before = closure_fingerprint(model)
    later = 1.0
    assert closure_fingerprint(model) != before


def test_defaults_are_noticed():
    array, other = np.zeros(2), np.zeros(2)

    def model(x=array, *, y=other):
        return x + y

    def change(which):
        which[0] = 1.0

    assert noticed(model, lambda: change(array))
    assert noticed(model, lambda: change(other))


def test_a_function_that_makes_others_with_defaults_and_closures_is_looked_into():
    def make(scale):
        def inner(x, shift=1.0):
            return np.sum(jnp.abs(x - shift)) * scale

        return inner

    assert closure_fingerprint(make) == closure_fingerprint(make)


def test_what_partial_binds_is_noticed():
    array = np.zeros(2)

    def model(x, y):
        return x + y

    def change():
        array[0] += 1.0

    assert noticed(functools.partial(model, array), change)
    assert noticed(functools.partial(model, y=array), change)
    assert noticed(functools.partial(functools.partial(model, y=1.0), array), change)
    bound = functools.partial(model, y=1.0)
    renamed = functools.partial(model, x=1.0)
    assert closure_fingerprint(bound) != closure_fingerprint(renamed)
    assert closure_fingerprint(bound) == closure_fingerprint(functools.partial(model, y=1.0))


def test_a_handler_around_a_model_hides_nothing():
    array = np.zeros(2)

    def model():
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=array)

    def change():
        array[0] += 1.0

    assert noticed(handlers.scale(model, scale=2.0), change)
    assert noticed(reweight(handlers.scope(model, prefix="in"), prior=0.5), change)
    scaled = handlers.scale(model, scale=2.0)
    assert noticed(scaled, lambda: setattr(scaled, "scale", 3.0))


def test_a_call_of_a_reweighted_model_is_no_change():
    model = reweight(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), prior=0.5)
    before = closure_fingerprint(model)
    handlers.seed(model, 0)()
    assert closure_fingerprint(model) == before


def test_the_object_of_a_method_is_noticed():
    class Regression:
        def __init__(self):
            self.data = np.zeros(2)

        def model(self):
            return self.data

    regression = Regression()

    def change():
        regression.data[0] += 1.0

    method = regression.model
    assert closure_fingerprint(method) == closure_fingerprint(regression.model)
    assert noticed(method, change)
    assert noticed(lambda: method(), change)


def test_a_wrapped_function_is_looked_into():
    array = np.zeros(2)

    @jax.jit
    def model():
        return array

    def change():
        array[0] += 1.0

    assert noticed(model, change)
    assert noticed(lambda: model(), change)


def test_functions_as_arguments_carry_their_surroundings():
    array = np.zeros(2)

    def link(x):
        return x + array

    before = fingerprint(link), fingerprint(functools.partial(link, 1.0))
    assert before == (fingerprint(link), fingerprint(functools.partial(link, 1.0)))
    array[0] = 1.0
    after = fingerprint(link), fingerprint(functools.partial(link, 1.0))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_tracer_is_passed_over():
    @jax.jit
    def outer(x):
        def model():
            return x

        assert closure_fingerprint(model) == closure_fingerprint(model)
        return x

    assert outer(1.0) == 1.0


# Results are never stale --------------------------------------------------------------------

Y = np.arange(4.0)


class Settings:
    spread = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    spread: float = 1.0


@dataclasses.dataclass(eq=False)
class Table:
    rows: np.ndarray


SPREAD = 1.0


class Called:
    def __call__(self, y):
        normal(SPREAD, y)

    def method(self, y):
        normal(self.spread(), y)

    def spread(self):
        return SPREAD


def normal(spread, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, spread))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y)


def of_class_attribute():
    def change():
        Settings.spread = 0.1

    return (lambda y: normal(Settings.spread, y)), change


def of_slots():
    held = Slotted()

    def change():
        held.spread = 0.1

    return (lambda y: normal(held.spread, y)), change


def of_set():
    held = {1.0}

    def change():
        held.remove(1.0)
        held.add(0.1)

    return (lambda y: normal(max(held), y)), change


def change_global():
    global SPREAD
    SPREAD = 0.1


@pytest.mark.parametrize(
    "make",
    [
        of_class_attribute,
        pytest.param(of_slots, marks=pytest.mark.long),
        pytest.param(of_set, marks=pytest.mark.long),
        pytest.param(lambda: (Called(), change_global), marks=pytest.mark.long),
        lambda: (Called().method, change_global),
    ],
    ids=["class attribute", "slots", "set", "callable object", "bound method"],
)
def test_what_a_model_reaches_is_never_stale(make, key):
    global SPREAD
    SPREAD, Settings.spread = 1.0, 1.0
    model, change = make()
    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    first = runner.evaluate(runner.init(key, Y), Y)
    state = runner.init(key, Y)
    change()
    changed = runner.evaluate(state, Y)
    new = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    assert_allclose(changed, new.evaluate(new.init(key, Y), Y), rtol=1e-9)
    assert np.abs(changed - first).min() > 0.1


def test_an_argument_whose_fields_changed_is_another(key):
    def model(table):
        normal(1.0, table.rows)

    table = Table(Y)
    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    state = runner.init(key, table)
    first = runner.evaluate(state, table)
    table.rows = Y + 1.0
    assert np.abs(runner.evaluate(state, table) - first).min() > 0.1


def test_handlers_around_a_call_count(key):
    runner = EnsembleMAP(lambda y: normal(1.0, y), numpyro.optim.Adam(0.1), ensemble_size=2)
    state = runner.init(key, Y)
    plain = runner.evaluate(state, Y)
    with numpyro.handlers.scale(scale=100.0):
        assert_allclose(runner.evaluate(state, Y), 100.0 * plain, rtol=1e-6)


# What cannot be compared, and what is changed in place ----------------------------------------


@pytest.mark.core
@pytest.mark.single
def test_an_array_that_jax_casts_may_be_changed_in_place():
    """In single precision JAX keeps the cast of such an array as long as any program holds it."""
    rows = np.arange(3.0)  # float64

    def model():
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", jnp.asarray(rows).sum())

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    state = runner.init(jax.random.key(0))
    before = runner.evaluate(state)
    rows[:] = 10.0
    assert_allclose(runner.evaluate(state), before - 27.0, rtol=1e-6)
    rows[:] = [0.0, 1.0, 2.0]
    assert_allclose(runner.evaluate(state), before, rtol=1e-6)


VARIABLE = contextvars.ContextVar("spread", default=1.0)
HELD = {"s": 1.0}


class Slots:
    __slots__ = ("__own", "open")

    def __init__(self):
        self.__own = self.open = 1.0

    def own(self):
        return self.__own

    def change(self):
        self.__own = self.open = 0.1


class Generous:
    def __getattr__(self, name):
        return HELD[name]


class Meta(type):
    @property
    def spread(cls):
        return HELD["s"]


class OfMeta(metaclass=Meta):
    pass


class Owner:
    pass


class Listing(list):
    pass


class Mapping(dict):
    pass


class Rows(np.ndarray):
    pass


def attribute(of):
    """Return a function that reads an object's attribute, and one that changes it."""
    of.s = 1.0
    return (lambda: of.s), lambda: setattr(of, "s", 0.1)


def item(of, place=0):
    """Return a function that reads an item, and one that changes it."""
    return (lambda: of[place]), lambda: of.__setitem__(place, type(of[place])(2))


def behind(reader):
    """Return a reader of the global dictionary, and a function that changes the dictionary."""
    HELD["s"] = 1.0
    return reader, lambda: HELD.update(s=0.1)


def a_frame(change):
    frame = pandas.DataFrame({"s": [1.0]})
    frame.attrs["s"] = 1.0
    return (lambda: frame), lambda: change(frame)


def an_array_of_xarray():
    labelled = xarray.DataArray([1.0], dims="row", coords={"row": [1.0]})
    return (lambda: labelled.row), lambda: labelled.coords.__setitem__("row", [0.1])


def a_dataset():
    data = xarray.Dataset({"s": ("row", [1.0])})
    return (lambda: data.s), lambda: data.s.values.__setitem__(0, 0.1)


def a_function():
    def f():
        return f.s

    f.s = 1.0
    return f, lambda: setattr(f, "s", 0.1)


def a_weak_reference():
    owner = Owner()
    owner.s = 1.0
    reference = weakref.ref(owner)
    return (lambda: (reference().s, owner)), lambda: setattr(owner, "s", 0.1)


def slots():
    held = Slots()
    return (lambda: held.own()), held.change


def a_proxy():
    behind = {"s": 1.0}
    proxy = types.MappingProxyType(behind)
    return (lambda: proxy["s"]), lambda: behind.update(s=0.1)


def the_environment():
    os.environ["SPREAD"] = "1"
    return (lambda: os.environ["SPREAD"]), lambda: os.environ.update(SPREAD="2")


def the_environment_imported():
    def read():
        import os as system

        return system.environ["SPREAD"]

    return read, the_environment()[1]


def a_global_by_name():
    globals()["BY_NAME"] = 1.0
    return (lambda: globals()["BY_NAME"]), lambda: globals().update(BY_NAME=0.1)


def a_context_variable():
    VARIABLE.set(1.0)
    return (lambda: VARIABLE.get()), lambda: VARIABLE.set(0.1)


CHANGED_IN_PLACE = {
    "a list": lambda: item([1.0]),
    "a dict": lambda: item({0: 1.0}),
    "an ordered dict": lambda: item(collections.OrderedDict({0: 1.0})),
    "a deque": lambda: item(collections.deque([1.0])),
    "array.array": lambda: item(array.array("d", [1.0])),
    "a bytearray": lambda: item(bytearray([1])),
    "a memoryview": lambda: item(memoryview(bytearray([1]))),
    "a mapping proxy": a_proxy,
    "a set": lambda: (lambda s: ((lambda: max(s)), s.clear))({1.0}),
    "values of a frame": lambda: a_frame(lambda f: f.__setitem__("s", [0.1])),
    "columns of a frame": lambda: a_frame(lambda f: setattr(f, "columns", ["t"])),
    "notes of a frame": lambda: a_frame(lambda f: f.attrs.update(s=0.1)),
    "an xarray dataset": a_dataset,
    "coordinates": an_array_of_xarray,
    "a namespace": lambda: attribute(types.SimpleNamespace()),
    "an object": lambda: attribute(Owner()),
    "a class": lambda: attribute(Owner),
    "a list's attribute": lambda: attribute(Listing()),
    "a dict's attribute": lambda: attribute(Mapping()),
    "an array's attribute": lambda: attribute(np.ones(2).view(Rows)),
    "a function's attribute": a_function,
    "an enum's attribute": lambda: attribute(Link.LOG),
    "slots": slots,
    "__getattr__": lambda: (lambda g: behind(lambda: g.s))(Generous()),
    "a metaclass": lambda: behind(lambda: OfMeta.spread),
    "a weak reference": a_weak_reference,
    "a context variable": a_context_variable,
    "the environment": the_environment,
    "the environment, imported": the_environment_imported,
    "a global by its name": a_global_by_name,
}


@pytest.mark.parametrize("case", CHANGED_IN_PLACE)
def test_what_is_changed_in_place_is_another_or_unknown(case):
    read, change = CHANGED_IN_PLACE[case]()
    before, again = closure_fingerprint(read), closure_fingerprint(read)
    assert before == again or is_unknown(before)
    change()
    assert closure_fingerprint(read) != before


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(a_context_variable, marks=pytest.mark.long),
        pytest.param(lambda: item(collections.deque([1.0])), marks=pytest.mark.long),
        slots,
    ],
)
def test_what_is_unknown_is_traced_but_not_compiled_again(make, compile_count, key):
    read, change = make()
    assert is_unknown(closure_fingerprint(read))

    def model(y):
        normal(read(), y)

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    first = runner.run(key, 3, Y, progress_bar=False)
    with compile_count() as compilations:
        again = runner.run(key, 3, Y, progress_bar=False)
        runner.run(key, 3, Y + 0.5, progress_bar=False)
    assert compilations.count == 0, compilations.names
    assert (again.losses == first.losses).all()
    change()
    changed = runner.run(key, 3, Y, progress_bar=False)
    new = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    assert_allclose(changed.losses, new.run(key, 3, Y, progress_bar=False).losses, rtol=1e-9)
    assert np.abs(changed.losses - first.losses).min() > 0.01


def test_draws_of_a_model_that_cannot_be_compared(key):
    """A function equals itself as a model, whatever data it reads."""
    read, _ = a_context_variable()

    def model(y):
        normal(read(), y)

    runner = EnsembleVI(
        model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2
    )
    result = runner.run(key, 3, Y, progress_bar=False)
    draws, _ = runner.draws(key, result, 5, (Y,), {})
    assert draws["mu"].shape == (2, 5)
    other = EnsembleVI(
        lambda y: model(y), AutoNormal(model), runner.optim, Trace_ELBO(), ensemble_size=2
    )
    with pytest.raises(ValueError, match="the result is of another model"):
        other.draws(key, result, 5, (Y,), {})


def test_an_installed_package_is_fixed_before_it_is_imported(monkeypatch, tmp_path):
    """A model may import a package in its body; at the first call it is not yet imported."""
    target = tmp_path / "target"  # of pip install --target, beside a file of the user's own
    (target / "theirs-1.0.dist-info").mkdir(parents=True)
    (target / "theirs-1.0.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1.0\n")
    (target / "theirs-1.0.dist-info" / "RECORD").write_text("a_package_in_target.py,sha256=x,0\n")
    cases = [("site-packages", "", False), ("work", "", True), ("target", "", False)]
    for place, beside, users in [*cases, ("target", "_too", True)]:
        name = f"a_package_in_{place.replace('-', '_')}{beside}"
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / f"{name}.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path / place)
        made = {}
        exec(f"def read():\n    import {name}\n    return 1.0", made)
        assert name not in sys.modules
        assert is_unknown(closure_fingerprint(made["read"])) is users


def test_objects_of_a_compiled_module_of_ones_own_are_unknown(monkeypatch):
    monkeypatch.setattr("numpyro_ensemble.calls.opening._is_users", lambda module: True)
    generator = np.random.PCG64(0)  # its state is in no attribute
    assert is_unknown(closure_fingerprint(lambda: generator))


def test_two_callbacks_are_two_programs(key):
    heard = collections.deque()

    def model(y):
        name = heard[0]
        normal(1.0, y)
        jax.debug.callback(lambda: heard.append(name))

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    for name in "ba":
        heard.clear()
        heard.append(name)
        runner.run(key, 3, Y, progress_bar=False)
        jax.effects_barrier()
        assert set(heard) == {name}
        assert len(heard) > 1


# Autoguides -----------------------------------------------------------------------------------


class Remembering(AutoNormal):
    """A guide with a setting, and with attributes of its own that its set-up writes."""

    def __init__(self, model, spread):
        super().__init__(model)
        self.spread, self.seen = spread, {}

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.seen["shapes"] = {name: jnp.shape(v) for name, v in self._init_locs.items()}
        self.first_start = jax.tree.map(lambda x: 2.0 * x, self._init_locs)

    def _get_posterior(self):
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        drawn = super().__call__(*args, **kwargs)
        numpyro.factor("spread", jnp.zeros(()) * self.first_start["mu"] - self.spread)
        return drawn


def test_what_a_guide_learns_is_told_from_its_settings(compile_count, key):
    def model(y):
        normal(1.0, y)

    guide = Remembering(model, 1.0)
    runner = EnsembleVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2)
    first = runner.run(key, 3, Y, progress_bar=False)
    assert guide.seen == {"shapes": {"mu": ()}}
    assert jax.tree.leaves(guide.first_start)[0].shape == ()
    with compile_count() as compilations:
        again = runner.run(key, 3, Y, progress_bar=False)
    assert compilations.count == 0, compilations.names
    assert (again.losses == first.losses).all()
    guide.spread = 2.0
    changed = runner.run(key, 3, Y, progress_bar=False)
    assert_allclose(changed.losses, first.losses - 1.0, rtol=1e-6)


@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.long), 1])
def test_the_rank_of_a_guide_can_be_assigned(rank, key):
    def model(y):
        numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        normal(1.0, y)

    guide = AutoLowRankMultivariateNormal(model, rank=rank)
    runner = EnsembleVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2)
    runner.init(key, Y)
    guide.rank = 3
    assert runner.get_params(runner.init(key, Y))["auto_cov_factor"].shape == (2, 5, 3)

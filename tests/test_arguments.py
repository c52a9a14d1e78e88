"""When two sets of arguments are equal, and how their leaves are sorted."""

import dataclasses
import enum
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from zoo import NNX

from numpyro_ensemble import EnsembleMAP, reweight
from numpyro_ensemble.arguments import NO_ARGUMENTS, CallForm, arrange, has_tracers, is_traceable
from numpyro_ensemble.fingerprints import captured, fingerprint


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
    [object(), types.SimpleNamespace(a=1), np.array([None]), np.zeros(1, [("a", object)])],
    ids=["object", "namespace", "objects", "structured objects"],
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
    """Say whether a function's surroundings are others after a change, and equal without one."""
    before = captured(fn)
    assert captured(fn) == before
    hash(before)
    rebind()
    return captured(fn) != before


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

    before = captured(model)
    later = 1.0
    assert captured(model) != before


def test_defaults_are_noticed():
    array, other = np.zeros(2), np.zeros(2)

    def model(x=array, *, y=other):
        return x + y

    def change(which):
        which[0] = 1.0

    assert noticed(model, lambda: change(array))
    assert noticed(model, lambda: change(other))


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
    assert captured(bound) != captured(renamed)
    assert captured(bound) == captured(functools.partial(model, y=1.0))


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
    before = captured(model)
    handlers.seed(model, 0)()
    assert captured(model) == before


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
    assert captured(method) == captured(regression.model)
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

        assert captured(model) == captured(model)
        return x

    assert outer(1.0) == 1.0


# Arranging --------------------------------------------------------------------------------------


def model(x, y=None, *, groups=None):
    return x, y, groups


Y = np.arange(4.0)


def kinds(arguments):
    return dict(zip(arguments.labels, arguments.kinds, strict=True))


def test_arrays_are_inputs_unless_a_model_looks_at_values():
    args, kwargs = (ZEROS, {"a": Y, "b": 2}), {"groups": "left"}
    plain = arrange(model, args, kwargs, traced=False)
    assert kinds(plain) == dict.fromkeys(["x", "y['a']", "y['b']", "groups"], "fixed")
    assert plain.leaves[0] is ZEROS
    traced = arrange(model, args, kwargs)
    assert kinds(traced) == {
        "x": "traced",
        "y['a']": "traced",
        "y['b']": "fixed",
        "groups": "fixed",
    }
    assert [isinstance(leaf, jax.Array) for leaf in traced.leaves] == [True, True, False, False]


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (jnp.ones(2), True),
        (np.ones(2, bool), True),
        (np.ones(2, np.int8), True),
        (np.ones(2, jnp.bfloat16), True),
        (KEY, True),
        (np.array(["a"]), False),
        (np.array([None]), False),
        (np.array("2020-01-01", "M8[D]"), False),
        (np.ma.array([1, 2], mask=[0, 1]), False),
        (np.float64(1.0), False),
        ([1.0], False),
    ],
)
def test_what_an_input_can_be(array, wanted):
    assert is_traceable(array) == wanted


@pytest.mark.parametrize(
    ("batch_args", "expected"),
    [
        (None, {"x": "batch", "y": "batch", "groups": "batch"}),
        (["y"], {"x": "fixed", "y": "batch", "groups": "fixed"}),
        ("y", {"x": "fixed", "y": "batch", "groups": "fixed"}),
        (0, {"x": "batch", "y": "fixed", "groups": "fixed"}),
        ([0, "groups"], {"x": "batch", "y": "fixed", "groups": "batch"}),
    ],
)
def test_batched_arguments_are_named_or_counted(batch_args, expected):
    args, kwargs = (ZEROS, Y), {"groups": Y}
    options = {"batched": True, "traced": False}
    found = arrange(model, args, kwargs, batch_args=batch_args, **options)
    assert kinds(found) == expected
    assert [leaf.shape for leaf in found.select("batch")] == [
        {"x": (2, 3), "y": (4,), "groups": (4,)}[k] for k, v in expected.items() if v == "batch"
    ]


def test_members_arguments_come_first_and_scalars_are_no_batches():
    args = (ZEROS, np.array(2.0), Y)
    found = arrange(lambda x, scale, y: None, args, {}, batched=True, member_args=["x"])
    assert kinds(found) == {"x": "member", "scale": "traced", "y": "batch"}
    both = arrange(model, (ZEROS, Y), {}, batched=True, batch_args=["x", "y"], member_args=[0])
    assert kinds(both) == {"x": "member", "y": "batch"}
    mixed = arrange(model, (ZEROS, Y), {}, member_args=[0])
    assert kinds(mixed) == {"x": "member", "y": "traced"}
    assert [label for label, _ in mixed.labelled("member")] == ["x"]


def test_names_come_from_the_signature():
    rest = functools.partial(model, ZEROS)
    assert arrange(rest, (Y,), {}).labels == ("y",)
    assert arrange(handlers.scale(model, scale=2.0), (ZEROS, Y), {}).labels == ("x", "y")
    assert arrange(lambda *rows: None, (ZEROS, Y), {}).labels == ("argument 0", "argument 1")
    assert arrange(lambda x, **more: None, (ZEROS,), {"y": Y}).labels == ("x", "y")
    second = arrange(lambda *rows: None, (ZEROS, Y), {}, member_args=[1])
    assert second.kinds == ("traced", "member")


@pytest.mark.parametrize("option", ["batch_args", "member_args"])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["z"], "names 'z'; the model was called with ['groups', 'x', 'y']"),
        ([2], "names 2; the model was called with"),  # groups is a keyword, it has no position
        (["groups"], "names 'groups', which holds no array with a leading axis"),
        (["y"], "names 'y', which holds no array with a leading axis"),
    ],
)
def test_what_cannot_be_named_is_an_error(option, wanted, message):
    args, kwargs = (ZEROS, np.array(1.0)), {"groups": "left"}
    with pytest.raises(ValueError) as error:
        arrange(model, args, kwargs, batched=True, **{option: wanted})
    assert str(error.value).startswith(f"{option} {message}")


@pytest.mark.leaks
def test_arguments_are_rebuilt_with_other_values():
    args, kwargs = (ZEROS, {"a": Y, "b": 2}), {"groups": None}
    found = arrange(model, args, kwargs, batched=True, batch_args=["x"], member_args=["y"])
    assert found.dynamic["traced"] == []

    @jax.jit
    def rebuilt(dynamic):
        (x, y), rest = found.rebuild(dynamic)
        assert has_tracers((x, y))
        assert y["b"] == 2
        assert rest == {"groups": None}
        return x + 1.0, y["a"] * 2.0

    x, a = rebuilt(found.dynamic)
    assert_array_equal(x, ZEROS + 1.0)
    assert_array_equal(a, Y * 2.0)
    assert not has_tracers(found.leaves)
    assert NO_ARGUMENTS.rebuild(NO_ARGUMENTS.dynamic) == ((), {})


def test_a_key_is_for_contents_and_for_shapes_where_arguments_are_traced():
    def arranged(x, **options):
        return arrange(model, (x, 2), {}, **{"traced": False, **options})

    key = arranged(ZEROS).key()
    assert arranged(ZEROS.copy()).key() == key
    assert arranged(ZEROS + 1.0).key() != key
    keys = []
    for shift in (0.0, 1.0):
        jax.make_jaxpr(lambda x: keys.append(arranged(x).key()))(ZEROS + shift)
    assert keys[0] == keys[1] != key
    assert arrange(model, (ZEROS, 3), {}).key() != key
    assert arrange(model, (), {"x": ZEROS, "y": 2}).key() != key
    traced = arranged(ZEROS, traced=True)
    assert traced.key() == arranged(ZEROS + 1.0, traced=True).key() != key
    assert traced.key() != arranged(ZEROS.T, traced=True).key()
    form = CallForm(traced)
    assert form == CallForm(arranged(ZEROS + 1.0, traced=True)) != CallForm(arranged(ZEROS))
    assert form.rebuild(traced.dynamic)[0][1] == 2
    assert not any(isinstance(leaf, np.ndarray) for leaf in form.arguments.leaves)


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
        of_slots,
        of_set,
        lambda: (Called(), change_global),
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

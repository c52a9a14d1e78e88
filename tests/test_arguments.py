"""How the leaves of a call's arguments are sorted, and which calls share one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpyro import handlers

from numpyro_ensemble.calls.arguments import (
    NO_ARGUMENTS,
    CallForm,
    arrange,
    has_tracers,
    is_traceable,
)

ZEROS = np.zeros((2, 3))
KEY = jax.random.key(0)


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
    assert kinds(found) == {"x": "member batch", "scale": "traced", "y": "batch"}
    found = arrange(lambda x, y: None, (Y, ZEROS), {}, batched=True, member_args=["x", "y"])
    assert kinds(found) == {"x": "member", "y": "member batch"}  # one number per member has no rows
    both = arrange(model, (ZEROS, Y), {}, batched=True, batch_args=["x", "y"], member_args=[0])
    assert kinds(both) == {"x": "member batch", "y": "batch"}
    rows = arrange(model, (ZEROS, Y), {}, batched=True, batch_args=["y"], member_args=[0])
    assert kinds(rows) == {"x": "member", "y": "batch"}
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
        ([2], "names 2; the model was called with"),  # groups is keyword-only: no position
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

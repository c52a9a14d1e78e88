"""Checks of the model and its arguments before anything is compiled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from numpyro_ensemble.calls.arguments import (
    BATCH,
    MEMBER,
    MEMBER_BATCH,
    ROW_AXES,
    TRACED,
    Arguments,
    has_tracers,
    traces,
)
from numpyro_ensemble.calls.keywords import check_call
from numpyro_ensemble.calls.tracing import LooksAtValuesError, looking, tracing_alone
from numpyro_ensemble.density import Site, filled_trace, model_sites
from numpyro_ensemble.fit.batches import Batches, check_follows, first_member, first_rows, rescaled
from numpyro_ensemble.fit.guides import check_hidden
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.handlers import is_zero, warn

_OWN_SCALE = (
    "give one number for each row. If the first axis has numbers for each member, name the "
    "argument in run(..., member_args=[...])."
)
_TRACED_BY = {BATCH: "batch_size", MEMBER: "member_args", MEMBER_BATCH: "member_args"}


def looks_at(arguments: Arguments, error: Exception) -> ValueError:
    """Return the error that names the traced arguments at whose values the model may look."""
    named = []
    for label, leaf, kind in zip(arguments.labels, arguments.leaves, arguments.kinds, strict=True):
        if kind in _TRACED_BY:
            named.append(f"{_TRACED_BY[kind]} traces {label!r}")
        elif kind == TRACED:
            outside = isinstance(leaf, jax.core.Tracer)
            by = "jit, vmap or grad around this call" if outside else "jit_model_args=True"
            named.append(f"{by} traces {label!r}")
    if not named:
        return ValueError(
            f"the model, guide or a schedule looks at the value of a latent, a parameter or a "
            f"step, which are traced in every fit: {error} Use jnp.where or jax.lax.cond there."
        )
    return ValueError(
        f"the model reads the values of an argument that is traced ({', '.join(named)}): "
        f"{error} Compute what it needs beforehand and pass that as an argument of its own that is "
        f"no array; or leave out the option or transformation that traces it."
    )


class _Supply(Messenger):
    """Give parameters that are declared without a value the user's start values.

    The modules of `numpyro.contrib` declare their parameters in this way too.
    """

    def __init__(self, starts: Mapping[str, Any]) -> None:
        self.starts = starts
        self.used: dict[str, Any] = {}
        self.missing: set[str] = set()
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "param" or msg["value"] is not None:
            return
        name = msg["name"]
        if not any(value is None for value in msg["args"]) or name.endswith("$params"):
            return
        if name not in self.starts:
            self.missing.add(name)
            return
        form = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), self.starts[name]
        )
        self.used[name] = form
        msg["value"] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), form)


def checked_sites(
    problem: Problem, arguments: Arguments, batches: Batches | None, starts: Mapping[str, Any]
) -> tuple[dict[str, Site], dict[str, Any]]:
    """Return the sites of a runner's model, traced abstractly, and check them.

    Args:
        problem: what is fitted.
        arguments: of the model.
        batches: how they are cut.
        starts: values, or shapes, for parameters that are declared without any.

    Returns:
        The sites, and the shapes of the parameters that have taken a value from `starts`.

    Raises:
        ValueError: if the model cannot be fitted, or does not follow its batches.
    """
    check_hidden(problem.guide)
    args, kwargs = jax.tree.unflatten(arguments.treedef, arguments.kinds)
    check_call(problem.model, args, kwargs, problem.hint)
    supply = _Supply(starts)
    full = _trace(problem, arguments, None, supply)
    problem.check_model(full)
    _check_widths(full)
    if isinstance(problem.guide, AutoGuide):
        _check_plates(full)
    if is_zero(problem.prior_weight) and not any(s.role == "likelihood" for s in full.values()):
        raise ValueError(
            "prior_weight=0 leaves nothing to fit: the model has no observed site. Pass the data, "
            "or give a positive prior_weight."
        )
    for option in ("prior_sites", "likelihood_sites"):
        unknown = sorted(set(getattr(problem, option)) - full.keys())
        if unknown:
            factors = sorted(name for name, site in full.items() if site.kind == "factor")
            raise ValueError(f"{option} names {unknown}; the model's factors are {factors}.")
    if batches is not None:
        try:
            part = _trace(problem, arguments, batches.size, supply)
        except LooksAtValuesError:
            raise
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the model fails on a batch of batch_size={batches.size} rows: {error}. Give its "
                f"plates the length of the batch, or leave batch_size out and use "
                f"numpyro.plate(..., subsample_size=...)."
            ) from error
        check_follows(full, part, batches, problem.likelihood_sites, problem.sums_out)
        _check_scales(problem, arguments, batches, full)
        _check_factors(problem, arguments)
    return full, supply.used


def _check_plates(sites: dict[str, Site]) -> None:
    """Raise a ValueError where one plate has two sizes, which autoguides cannot make."""
    sizes: dict[str, tuple[int, str]] = {}
    for site in sites.values():
        for plate, size in site.plates if site.kind in ("latent", "discrete") else ():
            before, name = sizes.setdefault(plate, (size, site.name))
            if size != before:
                raise ValueError(
                    f"plate {plate!r} has size {before} around {name!r} and {size} around "
                    f"{site.name!r}: give plates of different sizes different names."
                )


def _check_widths(sites: dict[str, Site]) -> None:
    """Warn of scales of more numbers than the log density has, whose terms they repeat."""
    for name, site in sites.items():
        if site.role is None:  # a plate or a parameter, without a density
            continue
        scale, density = getattr(site.scale, "shape", ()), site.density_shape
        try:
            scaled = jnp.broadcast_shapes(scale, density)
        except ValueError:
            raise ValueError(
                f"handlers.scale multiplies the log density of site {name!r}, of shape {density}, "
                f"by numbers of shape {scale}: {_OWN_SCALE}"
            ) from None
        if math.prod(scaled) > math.prod(density):
            warn(
                f"handlers.scale multiplies the log density of site {name!r}, of shape {density}, "
                f"by numbers of shape {scale}, so its sum has some terms more than once: "
                f"{_OWN_SCALE}"
            )


def _check_scales(
    problem: Problem, arguments: Arguments, batches: Batches, sites: dict[str, Site]
) -> None:
    """Raise a ValueError where a scale that the model computes changes with the batch."""
    names = [
        name
        for name, site in sites.items()
        if site.kind == "observed" and getattr(site.scale, "shape", None) == ()
    ]
    if not names or traces(arguments.leaves):
        return

    def scales(dynamic: dict) -> list[Any]:
        trace = filled_trace(problem.model, *arguments.rebuild(first_member(dynamic)))
        return [trace[name]["scale"] for name in names]

    scales_of = jax.jit(tracing_alone(scales))
    whole = arguments.dynamic
    piece = first_rows(whole, batches.size)
    for name, a, b in zip(names, scales_of(whole), scales_of(piece), strict=True):
        if not np.isclose(a, b):
            raise rescaled(name, a, b, batches)


def _check_factors(problem: Problem, arguments: Arguments) -> None:
    """Raise a ValueError where a factor of the likelihood does not depend on the batch at all."""
    wanted = problem.data_sites
    if not wanted:
        return

    def factors(**rows: jax.Array) -> list[jax.Array]:
        values = iter(rows.values())
        dynamic = {**member, **{kind: [next(values) for _ in member[kind]] for kind in ROW_AXES}}
        trace = filled_trace(problem.model, *arguments.rebuild(dynamic))
        return [trace[name]["fn"].log_prob(trace[name]["value"]) for name in wanted]

    member = first_member(arguments.dynamic)
    leaves = [leaf for kind in ROW_AXES for leaf in member[kind]]
    rows = {f"row{i:04d}": leaf for i, leaf in enumerate(leaves)}
    for name, sources in zip(wanted, eval_provenance(tracing_alone(factors), **rows), strict=True):
        if not sources:
            raise ValueError(
                f"factor {name!r} is part of the likelihood and does not depend on the batched "
                f"arguments: rescaling it for batch_size would count it too often. Take the data "
                f"from the arguments, or leave batch_size out."
            )


def _trace(
    problem: Problem, arguments: Arguments, rows: int | None, supply: _Supply
) -> dict[str, Site]:
    found: dict[str, Site] = {}

    def look(dynamic: dict) -> None:
        args, kwargs = arguments.rebuild(first_member(first_rows(dynamic, rows)))
        with supply:
            shared = _guide_params(problem.guide, args, kwargs)
            model = handlers.substitute(problem.model, data=shared) if shared else problem.model
            found.update(model_sites(model, args, kwargs, prior_sites=problem.prior_sites))

    try:
        jax.eval_shape(tracing_alone(looking(look)), arguments.dynamic)
    except LooksAtValuesError:
        raise
    except Exception as error:
        if supply.missing:
            raise without_value(supply.missing) from error
        raise
    if supply.missing:
        raise without_value(supply.missing)
    return found


def check_values(problem: Problem, arguments: Arguments) -> None:
    """Let NumPyro check the values of the data, which it cannot do while they are traced.

    It warns of observations outside their support, for example. Nothing is compiled.
    """
    traced = arguments.select(TRACED)
    if not traced or has_tracers(traced) or not all(leaf.is_fully_addressable for leaf in traced):
        return
    values = [x if _is_key(x) else np.asarray(x) for x in traced]
    dynamic = first_member({**arguments.dynamic, TRACED: values})

    def look() -> None:
        args, kwargs = arguments.rebuild(dynamic)
        seeded = handlers.seed(problem.model, jax.random.key(0))
        filled = handlers.substitute(seeded, substitute_fn=init_to_uniform())
        compute_log_probs(filled, args, kwargs, {})

    with contextlib.suppress(Exception):  # an error here comes again when the model is fitted
        jax.eval_shape(tracing_alone(look))


def check_one_posterior(problem: Problem, arguments: Arguments) -> None:
    """Raise a ValueError for repulsion between members that are fitted to different data."""
    own = [label for label, _ in arguments.labelled(MEMBER, MEMBER_BATCH)]
    if problem.repels and own:
        raise ValueError(
            f"member_args gives each member its own {own}, and repulsion is between members of one "
            f"posterior: leave member_args out, or repulsion."
        )


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _guide_params(guide: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the parameters of a hand-written guide, which a model may share."""
    if isinstance(guide, AutoGuide):
        return {}
    trace = handlers.trace(handlers.seed(guide, jax.random.key(0))).get_trace(*args, **kwargs)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def without_value(names: Collection[str]) -> ValueError:
    """Return the error that names a parameter without any value to start at."""
    return ValueError(
        f"parameter {sorted(names)[0]!r} has no initial value: give one to numpyro.param, or to "
        f"init_params=."
    )

"""Run one foreign model through everything, and return what came of it as plain data.

A row has a column for each way to use the model. A column is `{"ok": True, ...}` with figures where
there are some, or `{"ok": False, "reason": ...}`. Nothing raises: a failure is a row of the table.
"""

import re
from functools import partial

import fits
import jax
import samplers
from cases import ALL, FITS, Case
from numpyro.infer import autoguide

FULL = samplers.Size()
GUIDES = {name: getattr(autoguide, name) for name in FITS if name.startswith("Auto")}


def attempt(function, *args):
    """Return a column and what the function returned."""
    try:
        return {"ok": True}, function(*args)
    except Exception as error:
        text = " ".join(str(error).split())
        return {"ok": False, "reason": f"{type(error).__name__}: {text}"[:400]}, None


def run_fits(case: Case, key, columns=ALL, steps=fits.STEPS):
    """Return the columns of MAP, the guides, predictions and ArviZ."""
    row, fitted = {}, None
    builders = dict(GUIDES) if case.guide is None else {"own guide": lambda model: case.guide}
    if case.guide is None and "MAP" in columns:
        row["MAP"], _ = attempt(fits.point, case, key, steps)
    for name, build in builders.items():
        if name in columns or name == "own guide":
            row[name], outcome = attempt(fits.variational, case, build, key, steps)
            fitted = fitted or outcome
    for name, use in (
        ("Predictive", lambda vi, result: fits.predict(case, vi, result, key)),
        ("ArviZ", partial(fits.arviz, case)),
    ):
        if name in columns:
            absent = {"ok": False, "reason": "there is no fit"}
            row[name] = attempt(use, *fitted)[0] if fitted else absent
    return row


def run_samplers(case: Case, key, columns=ALL, size=FULL):
    """Yield the columns of NUTS and of the many-chain kernels beside it, one by one."""
    reference = None
    for name in ("NUTS", *(k for k in columns if k in samplers.KERNELS)):
        column, outcome = attempt(samplers.draw, name, case, key, size)
        if outcome is not None:
            column |= samplers.figures(*outcome)
            if name == "NUTS":
                reference = outcome[0]
            elif reference is not None:
                column["gap"] = samplers.mean_gap(outcome[0], reference)
        yield name, column


def run_model(name, model, args=(), kwargs=None, *, columns=ALL, size=FULL, report=None, **known):
    """Run a model through everything, and return a row of plain data.

    `report` is called with the row after the fits and after each sampler.
    """
    case = model if isinstance(model, Case) else Case(model, args, kwargs or {}, **known)
    report = report or (lambda row: None)
    double = jax.config.jax_enable_x64 and not case.single
    with jax.enable_x64(double):
        key = jax.random.key(0)
        row = {"model": name, "double": double, **run_fits(case, key, columns)}
        report(row)
        if case.guide is None and any(k in columns for k in samplers.KERNELS):
            for sampler, column in run_samplers(case, key, columns, size):
                row[sampler] = column
                report(row)
    return row


def complaints(row, refused=None, converged=1.05):
    """Return what is wrong with a row: columns that fail otherwise than they are known to."""
    wrong, refused = [], refused or {}
    for name, column in row.items():
        if name in ("model", "double", "NUTS"):
            continue
        if column.get("reason", "").startswith("UpstreamError"):
            continue
        if column["ok"] == (name in refused):
            said = "runs, though it is said not to" if column["ok"] else column["reason"]
            wrong.append(f"{name}: {said}")
        elif not column["ok"] and not re.search(refused[name], column["reason"]):
            wrong.append(f"{name}: the reason is {column['reason']!r}")
        elif "gap" in column and max(column["rhat"], row["NUTS"]["rhat"]) < converged:
            if column["gap"] > samplers.LIMIT:
                wrong.append(f"{name}: means are {column['gap']:.1f} standard errors from NUTS's")
    return wrong

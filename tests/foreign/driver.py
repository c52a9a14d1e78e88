"""Run one foreign model through all methods, and return the outcome as plain data.

A row has a column for each way to use the model. A column is `{"ok": True, ...}` with figures where
there are some, or `{"ok": False, "reason": ...}`. A failure raises no error; it is a column.
"""

import copy
import os
import re
from functools import partial
from itertools import chain

import fits
import jax
import samplers
from cases import ALL, FITS, SAMPLERS, Case, Size, says_unmixed
from numpyro.infer import autoguide

FULL = Size()
SHORT = Size(32, 300, 200)
NO_FIT = "there is no fit"
UNMIXED = 1.2  # R-hat above which a run must end with a warning
GUIDES = {name: getattr(autoguide, name) for name in FITS if name.startswith("Auto")}


def has_draws(case: Case, guide: str) -> bool:
    """Return whether a fitted guide has draws; those of Laplace need forward derivatives."""
    return not (case.reverse_only and guide == "AutoLaplaceApproximation")


def in_turn(place: int, case: Case) -> tuple[str, ...]:
    """Return the columns that `make foreign` runs for the model at a place of a list.

    All columns take longer to compile than a scheduled run has. Each model goes through MAP, one of
    the guides and one of the samplers. FOREIGN_TURN selects the guide and the sampler.
    """
    turn = place + int(os.environ.get("FOREIGN_TURN", "0"))
    guides = tuple(GUIDES)
    guide = guides[turn % len(guides)]
    columns = ["MAP", guide, "Predictive", "ArviZ"]
    if not has_draws(case, guide):
        columns = ["MAP", guide]
    kernel = SAMPLERS[turn % len(SAMPLERS)]
    columns += [kernel] if kernel in case.refused else ["NUTS", kernel]
    return tuple(columns)


def attempt(function, *args):
    """Call a function, and return a column and the function's value, or None if it raised."""
    try:
        return {"ok": True}, function(*args)
    except Exception as error:
        text = " ".join(str(error).split())
        return {"ok": False, "reason": f"{type(error).__name__}: {text}"[:400]}, None


def run_fits(case: Case, key, columns=ALL, steps=fits.STEPS):
    """Yield the columns of MAP, the guides, predictions and ArviZ, one by one."""
    fitted = None
    own = {"own guide": lambda _: copy.copy(case.guide)}
    builders = dict(GUIDES) if case.guide is None else own
    if case.guide is None and "MAP" in columns:
        yield "MAP", attempt(fits.point, case, key, steps)[0]
    for name, build in builders.items():
        if name in columns or name == "own guide":
            column, outcome = attempt(fits.variational, case, build, key, steps)
            if has_draws(case, name):
                fitted = fitted or outcome
            yield name, column
    for name, use in (
        ("Predictive", lambda vi, result: fits.predict(case, vi, result, key)),
        ("ArviZ", partial(fits.arviz, case)),
    ):
        if name in columns:
            absent = {"ok": False, "reason": NO_FIT}
            yield name, attempt(use, *fitted)[0] if fitted else absent


def run_samplers(case: Case, key, columns=ALL, size=FULL):
    """Yield the columns of NUTS and of the many-chain kernels beside it, one by one."""
    if case.guide is not None:
        return
    reference = None
    for name in ("NUTS", *SAMPLERS):
        if name not in columns:
            continue
        column, outcome = attempt(samplers.draw, name, case, key, size)
        if outcome is not None:
            column |= samplers.figures(*outcome)
            if name == "NUTS":
                reference = samplers.Reference(case, size, outcome[0], column["rhat"])
            elif reference is not None:
                column |= reference.compare(outcome[0], column["rhat"])
        yield name, column


def run_model(name, case: Case, *, columns=ALL, size=FULL, report=None):
    """Run a model through everything, and return a row of plain data.

    `report` is called with the row after each of its columns.
    """
    report = report or (lambda row: None)
    double = jax.config.jax_enable_x64 and not case.single
    size = size.at_most(case.size)
    with jax.enable_x64(double):
        key = jax.random.key(0)
        row = {"model": name, "double": double, "size": size._asdict()}
        parts = run_fits(case, key, columns), run_samplers(case, key, columns, size)
        for column, outcome in chain(*parts):
            row[column] = outcome
            report(row)
    return row


def complaints(row, refused=None):
    """Return complaints: columns that fail unexpectedly, lack a warning or differ from NUTS."""
    wrong, refused = [], refused or {}
    columns = {k: v for k, v in row.items() if k not in ("model", "double", "size", "NUTS")}
    reasons = {k: column.get("reason", "") for k, column in columns.items()}
    upstream = {k for k, reason in reasons.items() if reason.startswith("UpstreamError")}
    for name, column in columns.items():
        if name in upstream or (upstream and reasons[name] == NO_FIT):
            continue
        if column["ok"] == (name in refused):
            said = "runs, though it is said not to" if column["ok"] else column["reason"]
            wrong.append(f"{name}: {said}")
        elif not column["ok"]:
            if not re.search(refused[name], column["reason"]):
                wrong.append(f"{name}: the reason is {column['reason']!r}")
        elif name in SAMPLERS and column["rhat"] > UNMIXED and not says_unmixed(column["warnings"]):
            wrong.append(f"{name}: R-hat is {column['rhat']:.2f}, and the run does not warn")
        elif "gap" in column and max(column["rhat"], row["NUTS"]["rhat"]) < samplers.CONVERGED:
            if column["gap"] > samplers.LIMIT:
                wrong.append(f"{name}: means are {column['gap']:.1f} standard errors from NUTS's")
    return wrong

"""Models that others wrote, by every method: the table of the page "Models that others wrote".

Run `python benchmarks/foreign.py` for all models, or name some of them (`"ar2 scan" FMLayer`). Each
model runs in a process of its own, 240 seconds at most (`--limit 600` for more). All columns are
measured, or those of `--only NUTS,ChEES,MEADS`; other columns keep their values. Rows are kept in
`docs/foreign_models.json`, so that a table can be made in parts. `--table` alone renews the parts
of `docs/foreign_models.md` that are made from the rows. NumPyro's examples need `NUMPYRO_CHECKOUT`,
as `make foreign` does.
"""

import json
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import records

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "foreign_models.json"
PAGE = ROOT / "docs" / "foreign_models.md"
sys.path.insert(0, str(ROOT / "tests" / "foreign"))

from cases import ALL, SAMPLERS, Size, says_unmixed  # noqa: E402  (its folder is added above)

KERNELS = ("NUTS", *SAMPLERS)
PACKAGES = ("blayers", "aimz", "dynestyx", "numpyro_forecast")
FULL = Size()._asdict()
SHORT = {
    "AutoNormal": "Normal",
    "AutoMultivariateNormal": "MVN",
    "AutoLaplaceApproximation": "Laplace",
}


def catalogue():
    """Return for each model's name the function that builds its case."""
    import blayers_models
    import numpyro_examples
    import numpyro_examples_2  # noqa: F401  (adds its cases)
    import package_models

    found = dict.fromkeys(numpyro_examples.CASES, numpyro_examples.case)
    found |= dict.fromkeys(blayers_models.LAYERS, blayers_models.case)
    return found | dict.fromkeys(package_models.CASES, package_models.case)


def run_here(name, columns):
    """Run columns of one model in this process, and print its row after each."""
    import driver
    import jax

    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    case = catalogue()[name](name)
    if isinstance(case, str):
        report({"model": name, "absent": case})
    else:
        driver.run_model(name, case, columns=columns, report=report)


def report(row):
    print("ROW " + json.dumps(row), flush=True)


def run_apart(name, limit, columns):
    """Run one model in its own process; return its row, or the columns that it finished."""
    command = [sys.executable, __file__, "--here", name, *columns]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    late = False
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit, env=environment)
        printed, ended = done.stdout, f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed, ended, late = error.stdout or b"", f"took longer than {limit} s", True
    rows = [line[4:] for line in printed.decode().splitlines() if line.startswith("ROW ")]
    row = json.loads(rows[-1]) if rows else {"model": name}
    if late:
        missing = ("Predictive", "ArviZ") if "own guide" in row else ALL
        for column in set(missing) & set(columns):
            row.setdefault(column, {"ok": False, "reason": ended})
    elif not rows:
        row["absent"] = ended
    return row


def fit_cell(column):
    if column is None:
        return ""
    return "yes" if column["ok"] else "no"


def sampler_cell(column, nuts):
    """Return R-hat, effective draws a second over NUTS's, and the distance of the means."""
    if column is None:
        return ""
    if not column["ok"]:
        return "no"
    text = f"{column['rhat']:.3f}"
    if nuts and nuts["ok"] and column is not nuts:
        text += f", {column['rate'] / nuts['rate']:.1f} x"
        if max(column["rhat"], nuts["rhat"]) < 1.05 and column.get("gap", 0) > 4:
            text += f", means {column['gap']:.1f} se apart"
    warned = says_unmixed(column["warnings"])
    return text + (", warns" if warned else "")


def reasons(rows):
    """Return a line for each reason why columns failed, with its columns and models."""
    why = {}
    for model, row in rows.items():
        for name, column in row.items():
            if isinstance(column, dict) and not column.get("ok", True):
                kind = re.sub(r"'\w+'|\(\w+\)", "", column["reason"])  # without the site's name
                first, columns, models = why.setdefault(kind, (column["reason"], {}, {}))
                columns[SHORT.get(name, name)] = models[model] = True
    return [
        f"- {', '.join(columns)} of {', '.join(models)}: {shorten(first)}"
        for first, columns, models in why.values()
    ]


def shorten(reason, length=240):
    text = reason.removeprefix("UpstreamError: ").replace("|", "/").replace("`", "'")
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def best(row):
    """Return a recommendation for a model in a few words."""
    if "own guide" in row:
        return "EnsembleVI with its own guide" if row["own guide"]["ok"] else "SVI"
    rates = {
        name: row[name]["rate"]
        for name in KERNELS
        if name in row
        and row[name]["ok"]
        and row[name]["rhat"] < 1.02
        and row[name].get("gap", 0) < 4
    }
    if rates:
        return max(rates, key=rates.get)
    if not any(name in row for name in KERNELS):
        return ""
    fits = [n for n in ("MAP", *SHORT) if row.get(n, {"ok": False})["ok"]]
    sampled = row.get("NUTS", {"ok": False})["ok"]
    if sampled and any(row.get(n, {"ok": False})["ok"] for n in SAMPLERS):
        return "none of the samplers mixes in so short a run"
    if sampled:
        return "NUTS alone" if row["NUTS"]["rhat"] < 1.02 else "NUTS alone, in a longer run"
    return "EnsembleVI for a fit" if fits else "nothing ran"


def titled(name, row):
    """Return a model's name, with the number of chains and iterations where they are unusual."""
    size = row.get("size", FULL)
    if size == FULL:
        return name
    return f"{name} ({size['chains']} chains, {size['warmup']} + {size['draws']})"


def table(rows):
    lines = [
        "| model | latents | MAP | Normal | MVN | Laplace | predictions | ArviZ "
        "| NUTS | ChEES | MEADS | use |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "absent" in row:
            lines.append(f"| {name} |" + " |" * 10 + f" {shorten(row['absent'])} |")
            continue
        nuts = row.get("NUTS")
        size = nuts["latents"] if nuts and nuts["ok"] else ""
        own = {"MAP": None, "AutoNormal": row.get("own guide")} if "own guide" in row else row
        cells = [fit_cell(own.get(n)) for n in ("MAP", *SHORT)]
        cells += [fit_cell(row.get(n)) for n in ("Predictive", "ArviZ")]
        cells += [sampler_cell(row.get(n), nuts) for n in KERNELS]
        lines.append(f"| {titled(name, row)} | {size} | " + " | ".join(cells) + f" | {best(row)} |")
    return "\n".join(lines)


def versions():
    found = records.versions(("numpyro", "jax", "blackjax", *PACKAGES))
    return ", ".join(f"{name} {number}" for name, number in found.items() if name != "python")


def machine():
    """Return the machine that rows are measured on."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' * (cores > 1)} ({platform.machine()})"


def machines(rows):
    """Return a line for each machine and set of versions, with the models measured there."""
    found = {}
    for name, row in rows.items():
        found.setdefault((row["machine"], row["versions"]), []).append(name)
    largest = max(found.values(), key=len)
    rest = "the other models" if len(found) > 1 else "all models"
    return "\n".join(
        f"- {rest if names is largest else ', '.join(names)}: {where}, {versions}."
        for (where, versions), names in sorted(found.items(), key=lambda item: len(item[1]))
    )


def write_page(rows):
    """Renew the page's parts that are made from rows; each part stands between two comments."""
    parts = {
        "table": table(rows),
        "reasons": "\n".join(reasons(rows)) or "Everything ran.",
        "machines": machines(rows),
    }
    records.renew_page(PAGE, parts, "benchmarks/foreign.py")


def main(words):
    if words[:1] == ["--here"]:
        return run_here(words[1], words[2:])
    limit = int(records.option(words, "--limit", "240"))
    columns = records.option(words, "--only", ",".join(ALL)).split(",")
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    names = list(catalogue())
    if words != ["--table"]:
        for name in words or names:
            kept = rows.get(name, {}) if set(columns) < set(ALL) else {}
            where = {"versions": versions(), "machine": machine()}
            rows[name] = kept | run_apart(name, limit, columns) | where
            print(json.dumps(rows[name]), flush=True)
            ROWS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    write_page({name: rows[name] for name in names if name in rows})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1:])

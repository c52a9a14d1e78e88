"""All benchmarks in a small setting, one after another: `make bench` (`BENCH=engine,gp` for two).

Run `python benchmarks/suite.py [names]` for all benchmarks, or for the named ones. Each runs in a
process of its own, without JAX's cache of compiled programs. It prints its measurements and writes
a record with versions, commit and machine (see records.py). A table of all records follows. A
benchmark that fails is named at the end; the others still run. `--table [folder]` prints the table
of the records in a folder. `--page` writes the tables of `docs/benchmarks.md` from the records that
are kept in `benchmarks/results`: measure them by `RESULTS=benchmarks/results make bench BENCH=...`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from records import ROOT, renew_page, results_folder

# Each command's record has a name that begins with the benchmark's.
SMALL = {
    "engine": ["engine.py other loop unknown single"],
    "map_sinc": ["map_sinc.py"],
    "vi_sinc": ["vi_sinc.py 1"],
    "quasi_newton": ["quasi_newton.py logistic network --no-adam"],
    "repulsion": ["repulsion.py"],
    "predictive": ["predictive.py 50 500"],
    "log_likelihood": ["log_likelihood.py 100 2000"],
    "folds": ["folds.py 2"],
    "sbc": ["sbc.py 3"],
    "gp": ["gp.py basis", "gp.py speed 64 3", "gp.py reference 3", "gp.py hsgp 3"],
    "mcmc": ["mcmc.py speed radon 1 ChEES"],
    "chees": ["chees.py layout irt radon"],
    "minibatches": ["minibatches.py draws 100000"],
    "scaling": ["scaling.py bar"],
    "to_zarr": ["to_zarr.py 20000 40 3"],
    "uci": ["uci.py --shipped diabetes"],
}
LEFT_OUT = {
    "budget": "needs the data of inference-gym",
    "correlated": "takes many minutes: python benchmarks/correlated.py",
    "devices": "is for an accelerator: python benchmarks/devices.py",
    "foreign": "has a page of its own: python benchmarks/foreign.py",
    "networks": "takes many minutes: python benchmarks/networks.py diabetes",
    "optima": "needs BoTorch",
}
FLOAT64 = ("quasi_newton",)
# The Makefile caches compiled programs for the tests. Here a first call has to compile.
DROPPED = ("JAX_COMPILATION_CACHE_DIR", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT")
KEPT = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
OWN_COLUMNS = ("name", "ours", "theirs", "ratio", "target")


def run(name, command):
    """Run one command in its small setting; return whether it worked."""
    script, *words = command.split()
    path = ROOT / "benchmarks" / script
    environment = {key: value for key, value in os.environ.items() if key not in DROPPED}
    environment |= {"BENCH_SMALL": "1", "RESULTS": str(results_folder().resolve())}
    if name in FLOAT64:
        environment["JAX_ENABLE_X64"] = "1"
    print(f"\n== {command}", flush=True)
    call = [sys.executable, "-W", "ignore", str(path), *words]
    return subprocess.run(call, env=environment, cwd=ROOT).returncode == 0


def seconds(value):
    """Return seconds as text: a number, or median and range; in milliseconds below 0.1 s."""
    if value is None:
        return ""
    median = value["median"] if isinstance(value, dict) else value
    unit, factor = ("ms", 1e3) if median < 0.1 else ("s", 1)
    return f"{number(value, factor)} {unit}"


def number(value, factor=1):
    """Return a number as text with three digits, or median and range of several."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else f"{factor * value:.3g}"
    median, least, most = (f"{factor * value[key]:.3g}" for key in ("median", "least", "most"))
    return median if least == most else f"{median} [{least}, {most}]"


def others(row):
    """Return a row's other figures: accuracy, memory, or what a ratio of rates compares.

    `loss_instead` is the alternative's figure where `loss` is ours: "loss 1.2, instead 1.3".
    """
    named = (
        (key, f"{spelled(key)} {number(value)}")
        for key, value in row.items()
        if key not in OWN_COLUMNS
        and not (key.endswith("_instead") and key.removesuffix("_instead") in row)
    )
    return "; ".join(
        f"{text}, instead {number(row[f'{key}_instead'])}" if f"{key}_instead" in row else text
        for key, text in named
    )


def spelled(key):
    """Return a figure's key as words."""
    return key.replace("_", " ").replace("gib", "GiB").replace("mib", "MiB")


def table(record):
    """Return a record as a Markdown table."""
    lines = ["| | ours | instead | ratio | |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        ratio = "" if row.get("ratio") is None else number(row["ratio"])
        cells = (row["name"], seconds(row.get("ours")), seconds(row.get("theirs")), ratio)
        lines.append(f"| {' | '.join(cells)} | {others(row)} |")
    return "\n".join(lines)


def setting(record):
    """Return the command, versions and machine of a record, in one line."""
    where, small = record["machine"], "BENCH_SMALL=1 " * record["small"]
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"`{small}{record['command']}`, {record['float']}, {where['cores']} cores "
        f"({where['processor']}, {where['device']}), {where['memory_gib']:.0f} GiB, load "
        f"{where['load_before']} before, {record['seconds']:.0f} s in all, peak "
        f"{record['peak_gib']:.2f} GiB of the largest process, {record['date'][:10]}; {packages}"
    )


def read(folder, names=()):
    """Return the records of a folder, or those whose names begin with one of `names`."""
    paths = sorted(Path(folder).glob("*.json"))
    found = {p.stem: json.loads(p.read_text()) for p in paths}
    return {
        name: record
        for name, record in found.items()
        if not names or any(name.startswith(word) for word in names)
    }


def show(records):
    """Print a table of each record."""
    for name, record in records.items():
        print(f"\n{name}: {setting(record)}\n\n{table(record)}")


def write_page():
    """Write the tables of the documentation's page from the kept records."""
    parts = [f"### {name}\n\n{setting(r)}.\n\n{table(r)}" for name, r in read(KEPT).items()]
    renew_page(PAGE, {"records": "\n\n".join(parts)}, "benchmarks/suite.py")


def main(words):
    """Run the named benchmarks, or show or write the records that are there."""
    if words[:1] == ["--page"]:
        return write_page()
    if words[:1] == ["--table"]:
        return show(read(words[1] if words[1:] else results_folder()))
    unknown = [word for word in words if word not in SMALL]
    if unknown:
        reasons = [f"{word} {LEFT_OUT.get(word, 'is no benchmark')}" for word in unknown]
        sys.exit(f"{'; '.join(reasons)}. Choose from {', '.join(SMALL)}.")
    names = words or list(SMALL)
    failed = [c for name in names for c in SMALL[name] if not run(name, c)]
    show(read(results_folder(), names))
    if not words:
        print("\nLeft out:", *(f"{name} {why}" for name, why in LEFT_OUT.items()), sep="\n  ")
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main([word for words in sys.argv[1:] for word in words.replace(",", " ").split()])

"""Records of benchmarks: rows with the versions and the machine that they were measured on.

`with saved("engine"):` around a script's work writes the rows that `note` adds as JSON, with
versions, commit, machine, date, command and peak memory, to `.cache/bench/engine.json`, or to the
folder that `RESULTS` names. Processes that the script starts add to the same record.
`BENCH_SMALL=1` makes `sized` choose the small setting. This module imports JAX only when a record
is made.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpyro_ensemble", "jax", "jaxlib", "numpyro", "blackjax", "arviz", "optax")


def sized(full, small):
    """Return the setting of a full measurement, or a small one under `BENCH_SMALL=1`."""
    return small if os.environ.get("BENCH_SMALL") == "1" else full


def peak():
    """Return this process's peak memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def spread(values):
    """Return the median, the least and the most of some numbers."""
    values = [float(value) for value in values]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def note(name, **figures):
    """Add a row to the benchmark's record: numbers, words, or lists of repeated measurements.

    `ours` and `theirs` are seconds. `ratio` is ours over theirs unless the row says otherwise.
    A row whose seconds are from a single call says so.
    """
    record = os.environ.get("BENCH_RECORD")
    if record is None:
        return
    row = {
        key: spread(value) if isinstance(value, list | tuple) else value
        for key, value in figures.items()
        if value is not None
    }
    times = [figures[side] for side in ("ours", "theirs") if figures.get(side) is not None]
    if any(not isinstance(value, list | tuple) or len(value) == 1 for value in times):
        row["measured"] = "in one run"
    with open(record, "a") as file:
        file.write(json.dumps({"name": name, **row}, default=float) + "\n")


def option(words, name, default):
    """Return an option's value and remove both from the words of the command line."""
    if name not in words:
        return default
    place = words.index(name)
    value = words[place + 1]
    del words[place : place + 2]
    return value


def versions(packages=PACKAGES):
    """Return Python's version, the packages' versions, and the commit of this package."""
    import numpyro_ensemble

    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # The package may be imported from a folder without being installed, or beside an installed one.
    found["numpyro_ensemble"] = numpyro_ensemble.__version__
    at = commit(Path(numpyro_ensemble.__file__).parent)
    return found if at is None else found | {"commit": at}


def commit(folder):
    """Return the short hash of a package's commit, None outside a git checkout.

    "+changes" follows where the package, the examples or the benchmarks differ from the commit.
    Records may differ: each benchmark changes its own.
    """

    def git(*words):
        call = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
        return call.stdout.strip() if call.returncode == 0 else ""

    try:
        if not git("ls-files", "__init__.py"):  # an installed package below some other checkout
            return None
        compared = (":/numpyro_ensemble", ":/examples", ":/benchmarks", ":!/benchmarks/results")
        changes = git("status", "--porcelain", "--", *compared)
        return git("rev-parse", "--short", "HEAD") + "+changes" * bool(changes)
    except FileNotFoundError:  # git is not installed
        return None


def processor():
    """Return the name of the processor's model, or its architecture where the name is not known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {platform.machine()}" if names and names[0] else platform.machine()


def machine():
    """Return cores, memory, processor, JAX's device, and the load of the last minute."""
    import jax

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "processor": processor(),
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "load_before": round(os.getloadavg()[0], 1),
    }


def results_folder():
    """Return the folder that records are written to."""
    return Path(os.environ.get("RESULTS", ROOT / ".cache" / "bench"))


@contextmanager
def saved(name):
    """Record the rows of the block, and write them as JSON when it ends, also by an error."""
    import jax

    head = {
        "benchmark": name,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "small": sized(False, True),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }
    packages = ", ".join(f"{key} {value}" for key, value in head["versions"].items())
    print(f"{name}: {packages}; {head['machine']['device']}", flush=True)
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as record:
        os.environ["BENCH_RECORD"] = record.name
        try:
            yield
        finally:
            del os.environ["BENCH_RECORD"]
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            tail = {"seconds": time.perf_counter() - begin, "peak_gib": max(peak(), children)}
            tail["float"] = "float64" if jax.config.jax_enable_x64 else "float32"
            rows = [json.loads(line) for line in record.read().splitlines()]
            path = results_folder() / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            if rows:  # without rows, an earlier record stays
                path.write_text(json.dumps(head | tail | {"rows": rows}, indent=1) + "\n")


def renew_page(page, parts, script):
    """Write the page's parts `{name: lines}`; each part stands between two comments."""
    text = page.read_text()
    for part, lines in parts.items():
        begin, end = f"<!-- {part}: written by {script} -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no part that begins with {begin!r} and ends with {end!r}")
        text = f"{before}{begin}\n{lines}\n\n{end}{after}"
    page.write_text(text)

"""The tables of a paper on the 7B model that it measures: one command, which goes on where it was
stopped.

    python experiments/reproduce_7b/reproduce.py adasvd                  # all jobs, then tables and reports
    python experiments/reproduce_7b/reproduce.py adasvd --plan h100      # hours, memory and disk; reads no weights
    python experiments/reproduce_7b/reproduce.py adasvd --rehearse       # every job on a tiny model
    python experiments/reproduce_7b/reproduce.py soco model.dtype=float32         # overrides, for every command

What is finished is found again by its record, also across tables. Exit code 1 where jobs failed:
the same command tries them again.
"""  # noqa: E501

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specomp.cache import digest
from specomp.errors import UserError
from specomp.experiment.config import Request, ask, composed
from specomp.experiment.plan import duration, plan_of, size
from specomp.experiment.record import point_of
from specomp.numerics.work import STATED, seconds, stated_rates
from specomp.settings import PROGRAM
from specomp.tables.sweep import load_sweep

SPECOMP = [sys.executable, "-m", "specomp"]
# CHOICE: bfloat16 where the release is float16: rows that train or take gradients need its range.
# No folders of compressed models: they are made again from the cache within minutes.
HALF = ["model.dtype=bfloat16", "save=false"]
PAPERS = {
    "adasvd": [
        ["adasvd_table1", *HALF],
        # the paper's other models: reproduce.py adasvd model=opt_6_7b,mistral_7b,vicuna_7b
        ["adasvd_table2", "model=llama2_7b", *HALF],
        ["adasvd_table3a", *HALF],
        ["adasvd_table3b", *HALF],
        ["adasvd_table3c", *HALF],
        ["adasvd_table3d", *HALF],
        ["adasvd_table4", *HALF],
    ],
    "soco": [["soco_table", *HALF]],  # its tables are on LLaMA-7B
}
TINY = ["debug=tiny", "model.dtype=float32"]
# What a plan finds once for all jobs that share model and calibration.
SHARED = ("evaluate dense", "calibrate")


@dataclass
class Cost:
    """Of one table. seconds: beside what other jobs, of this table or of one before, have done;
    held: the most bytes at once, beside the process; saved, cached: bytes on disk.
    """

    jobs: int = 0
    seconds: float = 0.0
    held: float = 0.0
    saved: float = 0.0
    cached: float = 0.0


@dataclass
class Done:
    """What jobs that were looked at before leave behind."""

    work: set[str] = field(default_factory=set)
    measured: dict[str, set[str]] = field(default_factory=dict)  # ids of benchmarks, by weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("overrides", nargs="*", help="for every command")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", choices=STATED, metavar="DEVICE", help=", ".join(STATED))
    instead.add_argument("--rehearse", action="store_true", help="every job on a tiny model")
    parser.add_argument("--tables", help="only these experiments, with commas between")
    parser.add_argument("--write", type=Path, help="folder for tables and reports")
    typed = parser.parse_intermixed_args(arguments)
    tables = [[*table, *typed.overrides] for table in PAPERS[typed.paper]]
    known = [name for name, *_ in tables]
    asked = typed.tables.split(",") if typed.tables else known
    if wrong := [x for x in asked if x not in known]:
        parser.error(f"--tables {wrong[0]}: there are {', '.join(known)}")
    tables = [x for x in tables if x[0] in asked]
    if typed.plan:
        try:
            print(planned(tables, typed.plan))
        except UserError as error:
            print(f"reproduce.py: {error}", file=sys.stderr)
            return 1
        return 0
    if typed.rehearse:
        tables = [[*x, *TINY] for x in tables]
    outputs = Path(os.environ.get("SPECOMP_OUTPUTS", "outputs"))
    failed = [name for name, *more in tables if run(name, more)]
    for name, *more in tables:
        folder = str((typed.write or outputs / "reproduce_7b") / name)
        for tool in ("table", "report"):
            records = ["--records", str(outputs / "records"), "--write", folder]
            subprocess.run([*SPECOMP, tool, name, *more, *records], check=True)
    if failed:
        print(f"Not all jobs of {', '.join(failed)} ran: the same command tries them again.")
    return bool(failed)


def run(name: str, overrides: Sequence[str]) -> int:
    """One sweep; its exit code."""
    asked = ["-m", f"experiment={name}", *overrides]
    print(f"\n{' '.join([*PROGRAM.split(), *asked])}", flush=True)
    return subprocess.run([*SPECOMP, *asked], check=False).returncode


def planned(tables: Sequence[Sequence[str]], device: str) -> str:
    """What each table takes on one such device, as markdown."""
    done, costs = Done(), {}
    for name, *more in tables:
        costs[name] = cost_of(requests(name, more, device), device, done)
    header = (
        "| table | jobs | ~hours | ~peak memory | folders | cache |\n|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {name} | {x.jobs} | {x.seconds / 3600:.1f} | {size(x.held)} | {size(x.saved)} |"
        f" {size(x.cached)} |"
        for name, x in costs.items()
    ]
    total = duration(sum(x.seconds for x in costs.values()))
    disk = size(sum(x.saved + x.cached for x in costs.values()))
    told = (
        f"Altogether ~{total} on one {device.upper()}, {disk} of disk beside the downloads. Speeds"
        " are stated peaks, at the share of them that runs reach elsewhere: nothing was measured"
        " there. What jobs share is counted once, spectra in each job that reads them."
    )
    return f"{header}{chr(10).join(lines)}\n\n{told}"


def requests(name: str, overrides: Sequence[str], device: str) -> Iterator[Request]:
    """Every job of a sweep, checked."""
    for point in load_sweep([name, *overrides], []).points:
        for command in point.commands:
            yield ask(composed(*shlex.split(command)[len(PROGRAM.split()) :], f"plan={device}"))


def cost_of(jobs: Iterator[Request], device: str, done: Done) -> Cost:
    """Of one table after others."""
    cost = Cost()
    for request in jobs:
        found = plan_of(request)
        rates = stated_rates([x.work for x in found.stages], device)
        weights = point_of(request.config)
        wanted = {x.protocol for x in request.suite.benchmarks}
        first, known = weights not in done.measured, done.measured.setdefault(weights, set())
        new = wanted - known
        cost.jobs += 1
        for stage in found.stages:
            read = {x: request.config[x] for x in ("model", "calibration", "seed")}
            shared = f"{digest(read)} {stage.name} {stage.detail}"
            again = shared in done.work if stage.name in SHARED else not first
            if stage.name == "evaluate" and not first:
                again = not new
            if not again:
                cost.seconds += seconds(stage.work, rates)
                done.work.add(shared)
            cost.held = max(cost.held, found.size.held_bytes + stage.held)
        if first and request.options.save:
            cost.saved += found.compressed.model_bytes
        for what, amount in (
            (f"statistics {found.route.dense}", found.statistics_cached),
            (f"spectra {request.method.whitening} {request.method.target}", found.spectra_cached),
        ):
            mark = f"{digest(read)} {what}"
            if mark not in done.work:
                cost.cached += amount
                done.work.add(mark)
        known |= wanted
    return cost


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

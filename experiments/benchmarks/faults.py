"""Does the fast test suite still notice a wrong line? 60 seeded faults, one line each, all over the
package.

    python experiments/benchmarks/faults.py                       # all of them
    python experiments/benchmarks/faults.py 3 17 --only-first     # a quick look at two
    python experiments/benchmarks/faults.py --kind "cache key" --write faults.csv
    python experiments/benchmarks/faults.py --pytest='-m "slow or not slow"'      # the whole suite
    python experiments/benchmarks/faults.py --check               # only: is every line still there?

The working tree is copied once into a temporary folder, and only there lines are made wrong, one at
a time. Of each fault the test files run first that ought to notice it (`first`), then all others;
the first test that fails ends it. Before anything is made wrong the same tests run once as they
are: what fails then is named and left out. The exit code is 1 where a fault was missed.

On two cores a caught fault takes 15 to 100 seconds, most of them imports; all 60 take about three
quarters of an hour with --only-first. Without it the run before the first fault takes as long as
`make test`, and so does each fault that is missed.

`first` says where to look first, not who is responsible. A fault whose line has changed is an error
that names it: say here what the line is now, or take another one.
"""

import argparse
import ast
import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_TESTS = 5  # pytest's exit code where all were left out
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
OUT_OF_TIME = "OUT OF TIME"


@dataclass(frozen=True)
class Fault:
    """A part of one line that is there once, and what it becomes."""

    file: str
    old: str
    new: str
    kind: str
    first: tuple[str, ...]  # test files that ought to notice it

    def problem(self, root: Path) -> str | None:
        """Why it cannot be made, or None."""
        path = root / self.file
        if not path.is_file():
            return "there is no such file"
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            return f"{self.old!r} is there {count} times"
        if "\n" in self.old + self.new or self.old == self.new:
            return f"{self.old!r} -> {self.new!r} is no change of one line"
        if absent := [x for x in self.first if not (root / x).is_file()]:
            return f"there is no {absent[0]}"
        try:
            if path.suffix == ".py":
                ast.parse(text.replace(self.old, self.new))
        except SyntaxError as error:
            return f"{self.new!r} does not parse: {error.msg}"
        return None

    @contextmanager
    def made(self, root: Path, number: int) -> Iterator[None]:
        """The line is wrong while it is open."""
        path = root / self.file
        text, stat = path.read_text(), path.stat()
        try:
            path.write_text(text.replace(self.old, self.new))
            # Compiled files are told apart by time, in seconds, and size alone.
            os.utime(path, (stat.st_atime, stat.st_mtime + number))
            yield
        finally:
            path.write_text(text)
            os.utime(path, (stat.st_atime, stat.st_mtime))


UNIT = "tests/unit/test_"
FAULTS = (
    # numerics
    Fault(
        "specomp/numerics/factors.py",
        "return (factor * unit.sqrt()).T, self.damping",
        "return (factor * unit.sqrt()), self.damping",
        "transposition",
        ("tests/test_theorems.py",),
    ),
    Fault(
        "specomp/numerics/gates.py",
        "len(place), 0, -1, dtype=torch.float64",
        "0, len(place), dtype=torch.float64",
        "order",
        (f"{UNIT}gates.py",),
    ),
    Fault(
        "specomp/numerics/grid.py",
        "m * 4 * -(-n * self.bits // 32)",
        "m * 4 * (n * self.bits // 32)",
        "rounding",
        (f"{UNIT}prices.py", f"{UNIT}packed.py"),
    ),
    Fault(
        "specomp/numerics/linalg.py",
        "damped.diagonal().add_(damping * unit)",
        "damped.diagonal().add_(damping)",
        "unit",
        (f"{UNIT}linalg.py",),
    ),
    Fault(
        "specomp/numerics/statistics.py",
        "self.inner.update(self.sum / self.count)",
        "self.inner.update(self.sum / self.size)",
        "formula",
        (f"{UNIT}statistics.py",),
    ),
    # forms
    Fault(
        "specomp/forms/options.py",
        "paid = retention * self.dense * (1 + ROUNDING)",
        "paid = retention * self.dense",
        "rounding",
        (f"{UNIT}options.py",),
    ),
    Fault(
        "specomp/forms/pivoted.py",
        "left[row] += 1",
        "left[row] -= 1",
        "sign",
        (f"{UNIT}pivoted.py",),
    ),
    Fault(
        "specomp/forms/prices.py",
        "(part.index_bits or 8 * dtype.itemsize)",
        "(part.index_bits or dtype.itemsize)",
        "unit",
        (f"{UNIT}prices.py",),
    ),
    # methods
    Fault(
        "specomp/methods/adasvd.py",
        'return self.num_buckets if self.stack_of_batch == "off" else None',
        'return self.num_buckets if self.stack_of_batch == "mean" else None',
        "condition",
        ("tests/test_theorems_updates.py", "tests/test_stages.py"),
    ),
    Fault(
        "specomp/methods/anchored.py",
        "@ (cross - gram)",
        "@ (cross.T - gram)",
        "transposition",
        ("tests/test_anchored.py",),
    ),
    Fault(
        "specomp/methods/asvd.py",
        "key=lambda trial: (math.isnan(trial[0]), trial[0]))",
        "key=lambda trial: trial[0])",
        "order",
        (f"{UNIT}options.py",),
    ),
    Fault(
        "specomp/methods/block_refine.py",
        "base = self.learning_rate * math.sqrt(before)",
        "base = self.learning_rate",
        "formula",
        ("tests/test_block_refine.py",),
    ),
    Fault(
        "specomp/methods/fwsvd.py",
        "left=importance.sqrt()",
        "left=importance",
        "formula",
        ("tests/test_theorems.py",),
    ),
    Fault(
        "specomp/methods/global_loss.py",
        "if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):",
        "if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):",
        "comparison",
        (f"{UNIT}global_loss.py",),
    ),
    Fault(
        "specomp/methods/kronecker.py",
        "inputs.diagonal().sum().clamp_min(1e-30)",
        "inputs.diagonal().mean().clamp_min(1e-30)",
        "formula",
        ("tests/test_theorems.py",),
    ),
    Fault(
        "specomp/methods/lora.py",
        "moves_stored: ClassVar[bool] = True",
        "moves_stored: ClassVar[bool] = False",
        "refusal",
        ("tests/test_recovery.py",),
    ),
    Fault(
        "specomp/methods/soco.py",
        "max(1 - terms.target, 1e-6)",
        "max(terms.target, 1e-6)",
        "formula",
        (f"{UNIT}soco.py",),
    ),
    Fault(
        "specomp/methods/spectrum.py",
        "components = StoredSpectra(run, statistics)",
        "components = spectra",
        "plan",
        ("tests/test_repaired_spectrum.py",),
    ),
    Fault(
        "specomp/methods/svd.py",
        "if self.exact_budget else floor(menu, retention)",
        "if not self.exact_budget else floor(menu, retention)",
        "budget",
        (f"{UNIT}options.py",),
    ),
    Fault(
        "specomp/methods/svd_llm.py",
        "len(losses) * compression * share / total",
        "compression * share / total",
        "formula",
        (f"{UNIT}options.py",),
    ),
    # compression
    Fault(
        "specomp/compression/calibrate.py",
        '"precision": run.calibration.precision,',
        '"precision": "float32",',
        "cache key",
        ("tests/test_stages.py",),
    ),
    Fault(
        "specomp/compression/checks.py",
        "if allowed < least:",
        "if allowed < 0:",
        "refusal",
        ("tests/test_api.py", "tests/test_bad_input.py"),
    ),
    Fault(
        "specomp/compression/ledger.py",
        "held - (unrounded - stored) // 8",
        "held - (unrounded - stored)",
        "unit",
        (f"{UNIT}packed.py", f"{UNIT}ledger.py"),
    ),
    Fault(
        "specomp/compression/loop.py",
        "damping=evidence.spectrum(linear).damping,",
        "damping=0.0,",
        "damping note",
        ("tests/test_methods.py",),
    ),
    Fault(
        "specomp/compression/refine.py",
        "{unit.name: choice.size for unit, choice in choices.items()}",
        "len(choices)",
        "cache key",
        ("tests/test_block_refine.py",),
    ),
    Fault(
        "specomp/compression/report.py",
        "bound = spectrum.tail(rank)",
        "bound = spectrum.tail(rank + 1)",
        "off by one",
        ("tests/test_stages.py",),
    ),
    Fault(
        "specomp/compression/route.py",
        'by_repair = upstream == "dense" and repaired',
        "by_repair = repaired",
        "plan",
        ("tests/test_quantization.py",),
    ),
    Fault(
        "specomp/compression/spectra.py",
        "sorted(statistic_key(run, x) for x in whitening.needs)",
        "sorted(x.name for x in whitening.needs)",
        "cache key",
        ("tests/test_stages.py", "tests/test_api.py"),
    ),
    Fault(
        "specomp/compression/stream.py",
        "_cut((hidden, args, kwargs), num_samples - seen, len(hidden))",
        "_cut((hidden, args, kwargs), num_samples, len(hidden))",
        "shape",
        ("tests/test_stages.py",),
    ),
    # training
    Fault(
        "specomp/training/distill.py",
        "training_samples.num_samples - held_out",
        "training_samples.num_samples",
        "leak",
        ("tests/test_soco_runs.py", "tests/test_recovery.py"),
    ),
    Fault(
        "specomp/training/gated.py",
        "self.existing = self.existing[keep]",
        "self.existing = keep.nonzero().flatten()",
        "shape",
        (f"{UNIT}soco.py",),
    ),
    Fault(
        "specomp/training/schedule.py",
        "if done <= len(self.history):",
        "if done < len(self.history):",
        "comparison",
        (f"{UNIT}phases.py",),
    ),
    Fault(
        "specomp/training/spectrum.py",
        '"seed": run.seed,',
        '"seed": 0,',
        "cache key",
        ("tests/test_soco_runs.py",),
    ),
    Fault(
        "specomp/training/teacher.py",
        "pad(labels[:, 1:], (0, 1), value=-100)",
        "pad(labels, (0, 0), value=-100)",
        "off by one",
        (f"{UNIT}teacher.py",),
    ),
    # quantization
    Fault(
        "specomp/quantization/gptq.py",
        "int(order[j]) // grid.group_size",
        "j // grid.group_size",
        "order",
        (f"{UNIT}gptq.py",),
    ),
    Fault(
        "specomp/quantization/factors.py",
        'if self.order == "faithful" else',
        'if self.order != "faithful" else',
        "condition",
        (f"{UNIT}gptq.py",),
    ),
    # models
    Fault(
        "specomp/models/files.py",
        "digest([str(real), stat.st_size, stat.st_mtime_ns])",
        "digest([str(real), stat.st_size])",
        "cache key",
        (f"{UNIT}load.py",),
    ),
    Fault(
        "specomp/models/load.py",
        'sorted(info["missing_keys"])',
        'sorted(info["mismatched_keys"])',
        "refusal",
        (f"{UNIT}load.py",),
    ),
    Fault(
        "specomp/models/packed.py",
        "if grid.zeros is None and n % grid.group_size == 0:",
        "if grid.zeros is None:",
        "export",
        (f"{UNIT}packed.py",),
    ),
    Fault(
        "specomp/models/save.py",
        "module.merged_weight().to(dtype)",
        "module.merged_weight()",
        "export",
        (f"{UNIT}export.py",),
    ),
    Fault(
        "specomp/models/store.py",
        "self._release(index), always_call=True",
        "self._release(index)",
        "clean-up",
        ("tests/test_streaming.py",),
    ),
    # data
    Fault(
        "specomp/data/calibration.py",
        '"tokenizer": description["tokenizer"]["sha256"],',
        '"tokenizer": "",',
        "cache key",
        (f"{UNIT}calibration.py",),
    ),
    Fault(
        "specomp/data/pydocs.py",
        "seen.update(fresh)",
        "seen = set(fresh)",
        "leak",
        (f"{UNIT}corpora.py",),
    ),
    Fault(
        "specomp/data/samplers.py",
        "samples = samples[:-1]",
        "samples = samples[1:]",
        "off by one",
        (f"{UNIT}samplers.py",),
    ),
    # evaluation
    Fault(
        "specomp/evaluation/harness.py",
        "else -(-self.limit // (MMLU_SUBJECTS if self.task == MMLU else 1))",
        "else self.limit // (MMLU_SUBJECTS if self.task == MMLU else 1)",
        "rounding",
        (f"{UNIT}harness.py",),
    ),
    Fault(
        "specomp/evaluation/perplexity.py",
        '"collapsed": 0.0 if ppl <= vocabulary else 1.0,',
        '"collapsed": 1.0 if ppl > vocabulary else 0.0,',
        "comparison",
        (f"{UNIT}perplexity.py",),
    ),
    # experiment
    Fault(
        "specomp/experiment/completed.py",
        'OmegaConf.merge(corpus, {"split": place.corpus.split})',
        "corpus",
        "config",
        ("tests/test_configs.py",),
    ),
    Fault(
        "specomp/experiment/names.py",
        'found |= {"name": None}',
        "found |= {}",
        "record key",
        (f"{UNIT}names.py",),
    ),
    Fault(
        "specomp/experiment/pipeline.py",
        "lost = experiment.options.save and folder is not None",
        "lost = folder is not None",
        "resume",
        ("tests/test_pipeline.py",),
    ),
    Fault(
        "specomp/experiment/summary.py",
        'if "wikitext2" in same else',
        'if "wikitext2" not in same else',
        "message",
        (f"{UNIT}summary.py",),
    ),
    Fault(
        "specomp/experiment/tracking.py",
        "_offline_from_now.set()",
        "_offline_from_now.clear()",
        "condition",
        (f"{UNIT}tracking.py",),
    ),
    # tables
    Fault(
        "specomp/tables/sweep.py",
        "or any(c.of(record) is None for c in point.columns)",
        "or all(c.of(record) is None for c in point.columns)",
        "table",
        ("tests/test_experiments.py",),
    ),
    Fault(
        "specomp/tables/paper.py",
        "return min(means) if column.lower_is_better else max(means)",
        "return max(means) if column.lower_is_better else min(means)",
        "table",
        ("tests/test_experiments.py",),
    ),
    # what is on top
    Fault(
        "specomp/api.py",
        'model_key="only this one" if cache is None else model_key(model),',
        'model_key="only this one",',
        "cache key",
        ("tests/test_api.py",),
    ),
    Fault(
        "specomp/pricing.py",
        "model_bytes=others * item + stored // 8,",
        "model_bytes=others * item + stored,",
        "unit",
        (f"{UNIT}plan.py",),
    ),
    Fault(
        "specomp/cache.py",
        "with disk_errors(final), self.lock(kind, key):",
        "with disk_errors(final):",
        "lock",
        (f"{UNIT}cache.py",),
    ),
    Fault(
        "specomp/cache.py",
        'if metadata.get("key") != key or metadata.get("checksum") != checksum(tensors):',
        'if metadata.get("key") != key:',
        "condition",
        (f"{UNIT}cache.py",),
    ),
    Fault(
        "specomp/cli.py",
        "raise CompactHydraException(line) from error",
        "return None",
        "swallowed error",
        ("tests/test_pipeline.py", "tests/test_bad_input.py"),
    ),
    # conf
    Fault(
        "conf/calibration/sampler/svd_llm.yaml",
        "seed: 3 ",
        "seed: 0 ",
        "config",
        (f"{UNIT}calibration.py",),
    ),
    Fault(
        "conf/method/whitening/kronecker.yaml",
        "damping: 1.0e-2 ",
        "damping: 1.0e-1 ",
        "config",
        (f"{UNIT}names.py",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault. by: the first test that failed, or OUT_OF_TIME; None: missed."""

    by: str | None
    early: bool  # by one of the first files
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether a test failed; one that only takes too long says nothing of the others."""
        return self.by not in (None, OUT_OF_TIME)

    def __str__(self) -> str:
        return f"caught by {self.by}" if self.caught else self.by or "MISSED"


class Scratch:
    """A copy of the working tree, and its tests."""

    def __init__(self, root: Path, arguments: Sequence[str], workers: int) -> None:
        self.root, self.arguments, self.workers = root, list(arguments), workers
        self.environment = {**os.environ, "PYTHONPATH": str(root)}
        self.left_out: list[str] = []  # tests that fail without a fault
        copied(root)
        self._check_imports()

    def _check_imports(self) -> None:
        """Raises SystemExit where specomp or its yamls would be another one's."""
        line = "import specomp.settings as x; print(x.__file__, x.CONF, sep='\\n')"
        found = subprocess.run(
            [sys.executable, "-c", line],
            cwd=self.root.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for place in found[:2]:
            if self.root.resolve() not in Path(place).resolve().parents:
                raise SystemExit(f"{place} is not of the copy in {self.root}.")

    def clean(self, files: Sequence[str]) -> None:
        """Run the tests as they are; what fails is left out from here on. Raises SystemExit where
        they cannot be run.
        """
        code, text = self._pytest([*self._workers(files), *files], None)
        self.left_out = failed(text)
        unusable = [x for x in self.left_out if "::" not in x]
        if code not in (0, 1, NO_TESTS) or unusable or (code == 1 and not self.left_out):
            raise SystemExit(f"{text}\nThe tests do not run without a fault either.")

    def tried(self, fault: Fault, number: int, limit: float, *, only_first: bool) -> Outcome:
        """Make one fault, and look who notices."""
        start, stages = time.monotonic(), [(True, [*fault.first])]
        if not only_first:
            stages.append((False, [f"--ignore={x}" for x in fault.first]))
        by, early = None, False
        with fault.made(self.root, number):
            for early, what in stages:
                left = max(1.0, start + limit - time.monotonic())
                how = self._workers(fault.first if early else ())
                code, text = self._pytest([*how, "-x", *what], left)
                if code is None:
                    by = OUT_OF_TIME
                elif code not in (0, NO_TESTS):
                    # without a test's name: the fault keeps the tests from being collected
                    by = next(iter(failed(text)), None) or text.strip().rpartition("\n")[2]
                if by is not None:
                    break
        return Outcome(by=by, early=early, seconds=time.monotonic() - start)

    def _workers(self, files: Sequence[str]) -> list[str]:
        """No more processes than files, since each has to start."""
        count = min(self.workers, len(files)) if files else self.workers
        return ["-n", str(count if count > 1 else 0)]

    def _pytest(self, what: Sequence[str], limit: float | None) -> tuple[int | None, str]:
        """Exit code, None where the time is over, and what it printed."""
        quiet = ["--tb=no", "-rfE", "-p", "no:cacheprovider"]
        skip = [f"--deselect={x}" for x in self.left_out]
        line = [sys.executable, "-m", "pytest", *quiet, *self.arguments, *skip, *what]
        process = subprocess.Popen(
            line,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its workers end with it
        )
        try:
            text, _ = process.communicate(timeout=limit)
            return process.returncode, text
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def failed(text: str) -> list[str]:
    """The tests that pytest's summary says failed, in its order."""
    return FAILED.findall(text)


def copied(target: Path) -> None:
    """What git knows of the working tree, as it is now, and what it would take in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def check(root: Path) -> None:
    """Whether every fault can be made. Raises SystemExit that names those that cannot."""
    found = {number: x.problem(root) for number, x in enumerate(FAULTS, start=1)}
    wrong = [f"{n} {FAULTS[n - 1].file}: {told}" for n, told in found.items() if told]
    if wrong:
        raise SystemExit("\n".join(["These faults cannot be made:", *wrong]))


def row(number: int, fault: Fault, outcome: Outcome) -> dict[str, object]:
    """One line of the csv."""
    told = {"file": fault.file, "kind": fault.kind, "old": fault.old, "new": fault.new}
    seconds = f"{outcome.seconds:.1f}"
    early = outcome.caught and outcome.early
    found = {"caught": outcome.caught, "by": outcome.by or "", "early": early}
    return {"number": number, **told, **found, "seconds": seconds}


def summary(outcomes: Mapping[int, Outcome]) -> str:
    """How many were caught, and which were not."""
    caught = [x for x in outcomes.values() if x.caught]
    early, seconds = sum(x.early for x in caught), sum(x.seconds for x in outcomes.values())
    text = f"{len(caught)} of {len(outcomes)} caught, {early} by the first files, {seconds:.0f} s"
    for told, by in (("missed", None), ("out of time", OUT_OF_TIME)):
        if numbers := [str(n) for n, x in outcomes.items() if x.by == by]:
            text += f"; {told}: {', '.join(numbers)}"
    return text


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = sorted({x.kind for x in FAULTS})
    add = parser.add_argument
    add("numbers", nargs="*", type=int, help=f"1 to {len(FAULTS)} (default: all)")
    add("--kind", action="append", choices=kinds, help="only these; may be given several times")
    add("--only-first", action="store_true", help="run only the test files that ought to notice")
    add("--pytest", default="", metavar="ARGS", help="more arguments: --pytest='-m ...'")
    add("--workers", type=int, default=2, help="processes that run tests (default: 2)")
    add("--limit", type=float, default=3600, help="seconds for one fault (default: 3600)")
    add("--write", type=Path, metavar="FILE", help="also as csv")
    add("--check", action="store_true", help="only look whether every fault can be made")
    options = parser.parse_args()
    wanted = options.numbers or range(1, len(FAULTS) + 1)
    if unknown := [x for x in wanted if not 1 <= x <= len(FAULTS)]:
        parser.error(f"there is no fault {unknown[0]}, only 1 to {len(FAULTS)}")
    chosen = {n: FAULTS[n - 1] for n in wanted}
    chosen = {n: x for n, x in chosen.items() if x.kind in (options.kind or kinds)}
    check(ROOT)
    if options.check:
        counts = Counter(x.kind for x in FAULTS)
        print(f"{len(FAULTS)} faults: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
        return
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = Scratch(Path(folder) / "copy", shlex.split(options.pytest), options.workers)
        check(scratch.root)  # others may have written to the tree meanwhile
        start = time.monotonic()
        files = dict.fromkeys(x for fault in chosen.values() for x in fault.first)
        scratch.clean(list(files) if options.only_first else [])
        left_out = f"; left out: {', '.join(scratch.left_out)}" if scratch.left_out else ""
        print(f"without a fault: {time.monotonic() - start:.1f} s{left_out}", flush=True)
        rows = []
        for number, fault in chosen.items():
            outcome = scratch.tried(fault, number, options.limit, only_first=options.only_first)
            outcomes[number] = outcome
            told = f"{number:2d} {fault.file}, {fault.kind}: {outcome}, {outcome.seconds:.1f} s"
            print(told, flush=True)
            rows.append(row(number, fault, outcome))
            if options.write is not None:  # anew each time: an interrupted run leaves what it has
                with options.write.open("w", newline="") as file:
                    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
    print(summary(outcomes))
    if not all(x.caught for x in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

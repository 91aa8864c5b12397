"""What happens to a run when it is killed, when its files are damaged, when a disk is full, when
others use its cache? Each trial ends in the right number, or in one line and an exit code that is
not 0; anything else is a fault.

    python experiments/benchmarks/robustness.py                       # all: hours
    python experiments/benchmarks/robustness.py flips --trials 500
    python experiments/benchmarks/robustness.py kills --run trained --every 10
    python experiments/benchmarks/robustness.py --write table.md

Runs are `debug=tiny ...`, typed as a user would, each in a process of its own that is forked from
one that has imported everything (so a trial takes a second). Kinds of trial:

    kills        SIGKILL before a change of the file system (an open for writing, a rename, a new or
                 removed folder, a removal); then the same command again, which must also leave
                 nothing behind that the first one made
    full         the same places, but the change fails: no space left on the device
    damage       every file that a run leaves in its cache and outputs: empty, cut, null, garbage, a
                 folder, a dangling link, not readable (not for root); then a run that needs them
    flips        one random bit of one random file, its times restored; then a run that needs them
    concurrency  eight processes that start the same run at the same time
"""

import argparse
import errno
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NUMBER = re.compile(r"perplexity \([^)]*\)\s+\S+\s+(\S+)")
RUNS = {
    "closed form": ("method=adasvd",),
    "rounded": ("method=svd_llm", "quantizer=rtn_int4"),
    "merged": ("method=svd_llm", "export=dense"),
    "streamed": ("method=svd_llm", "model=local", "model.path={model}", "model.stream=true"),
    "trained": ("method=soco", "method.training.steps_factor=0.02"),
}
MORE = "benchmark.max_windows=3"  # another benchmark of a finished run: it needs the model again
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "null": lambda path: path.write_text("null"),
    "garbage": lambda path: path.write_bytes(b"\xff\x00{[" * 20),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    "not readable": lambda path: path.chmod(0),
}
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")


@dataclass
class Trial:
    """One thing that was done to a run, and what came of it."""

    kind: str
    run: str
    what: str
    fault: str | None  # None: held


@dataclass
class Place:
    """A cache and outputs of their own."""

    root: Path
    model: Path
    lines: str = field(default="", repr=False)

    def copy(self, name: str) -> "Place":
        """The same files elsewhere."""
        other = Place(self.root.with_name(name), self.model)
        shutil.rmtree(other.root, ignore_errors=True)
        if self.root.exists():
            shutil.copytree(self.root, other.root, symlinks=True)
        return other

    def files(self) -> list[Path]:
        """All that a run left, but for its logs and locks."""
        found = (p for p in self.root.rglob("*") if p.is_file() and not p.is_symlink())
        return sorted(p for p in found if not {"logs", "locks", ".locks"} & set(p.parts))

    def need(self, file: Path) -> None:
        """See to it that a run reads a file: of the cache nothing is, where all is done already."""
        if file.parts[0] == "cache":
            shutil.rmtree(self.root / "outputs")

    def start(self, typed: list[str], hook: Callable[..., None] | None) -> int:
        """The process of a run."""
        pid = os.fork()
        if pid:
            return pid
        self.root.mkdir(parents=True, exist_ok=True)
        out = os.open(self.root / f"out-{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {
            "SPECOMP_CACHE": str(self.root / "cache"),
            "SPECOMP_OUTPUTS": str(self.root / "outputs"),
        }
        code = 1
        try:
            from specomp import cli

            sys.argv = ["specomp", *typed]
            if hook is not None:
                sys.addaudithook(hook)
            code = cli.run(typed) or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):  # as the interpreter does
                sys.stderr.write(f"{error.code}\n")
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, pid: int) -> int:
        """Its exit code, negative where a signal ended it; what it printed is in `lines`."""
        status = os.waitpid(pid, 0)[1]
        out = self.root / f"out-{pid}"
        self.lines = out.read_text(errors="replace")
        out.unlink()
        return os.waitstatus_to_exitcode(status)

    def typed(self, name: str, *more: str) -> list[str]:
        """The command of a run."""
        settings = (x.format(model=self.model) for x in RUNS[name])
        return ["debug=tiny", *settings, *more]

    def go(self, name: str, *more: str, hook: Callable[..., None] | None = None) -> int:
        """Run to its end."""
        return self.finish(self.start(self.typed(name, *more), hook))

    @property
    def number(self) -> str | None:
        """The compressed model's perplexity, as printed last."""
        found = NUMBER.findall(self.lines)
        return found[-1] if found else None

    def judged(self, code: int, right: str) -> str | None:
        """What is wrong with what a run printed; None where it held."""
        if "Traceback" in self.lines:
            return "traceback: " + self.lines.strip().splitlines()[-1][:200]
        if code == 0:
            return None if self.number == right else f"{self.number} instead of {right}"
        return None if "specomp: " in self.lines else f"exit code {code} without a line"


def changes(root: Path, at: int | None, act: Callable[[], None]) -> Callable[..., None]:
    """An audit hook that counts changes below a folder (into `changes.count`), and acts before one
    of them.
    """
    count, inside = 0, os.fspath(root)

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event not in WRITES or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not _writes(args):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(inside):
            return
        if "out-" in os.fsdecode(args[0]):
            return
        count += 1
        if at is None:
            os.write(COUNTED, b".")
        elif count == at:
            act()

    return hook


COUNTED = -1  # a pipe to the parent


def _writes(args: tuple[object, ...]) -> bool:
    mode, flags = args[1], args[2]
    if isinstance(mode, str):
        return any(x in mode for x in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def counted(place: Place, name: str) -> int:
    """How many changes of the file system a run makes."""
    global COUNTED
    reading, COUNTED = os.pipe()
    pid = place.start(place.typed(name), changes(place.root, None, lambda: None))
    os.close(COUNTED)
    total = 0
    while piece := os.read(reading, 65536):
        total += len(piece)
    os.close(reading)
    assert place.finish(pid) == 0, place.lines
    return total


def killed() -> None:
    """As by the out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    """As of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(
    kind: str, name: str, empty: Place, right: str, args: argparse.Namespace
) -> Iterator[Trial]:
    """Kills, or a full disk, at every n-th change."""
    total = counted(empty.copy("counted"), name)
    clean = empty.copy("clean")
    assert clean.go(name) == 0, clean.lines
    for at in range(1 + args.seed % args.every, total + 1, args.every):
        place = empty.copy("trial")
        code = place.go(name, hook=changes(place.root, at, killed if kind == "kills" else no_space))
        what = f"change {at} of {total}"
        if kind == "full" and (fault := place.judged(code, right)):
            yield Trial(kind, name, what, fault)
            continue
        fault = place.judged(place.go(name), right)
        left = [x.name for x in place.root.rglob("*") if x.name.endswith((".tmp", ".old"))]
        more = len(place.files()) - len(clean.files())
        if fault is None and left:
            fault = f"left behind: {', '.join(left[:3])}"
        if fault is None and more > 0:
            fault = f"{more} files more than of a run that nothing happened to"
        yield Trial(kind, name, what, fault)


def damage(name: str, whole: Place, right: str, args: argparse.Namespace) -> Iterator[Trial]:
    """Every file, in every way."""
    for number, file in enumerate(whole.files()):
        if (number + args.seed) % args.every:
            continue
        relative = file.relative_to(whole.root)
        for how, make in DAMAGE.items():
            if how == "not readable" and os.getuid() == 0:
                continue
            place = whole.copy("trial")
            make(place.root / relative)
            place.need(relative)
            code = place.go(name, MORE)
            fault = place.judged(code, right)
            if fault is None and code:  # refused: again in one line, not half repaired
                fault = place.judged(place.go(name, MORE), right)
            yield Trial("damage", name, f"{relative} {how}", fault)


def flips(name: str, whole: Place, right: str, args: argparse.Namespace) -> Iterator[Trial]:
    """Random bits of random files."""
    draw = random.Random(args.seed)
    files = [x for x in whole.files() if x.stat().st_size]
    for _ in range(args.trials // len(args.run or RUNS)):
        relative = draw.choice(files).relative_to(whole.root)
        place = whole.copy("trial")
        path = place.root / relative
        content, times = bytearray(path.read_bytes()), path.stat()
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        place.need(relative)
        fault = place.judged(place.go(name, MORE), right)
        yield Trial("flips", name, f"{relative} bit {bit}", fault)


def concurrency(name: str, empty: Place, right: str, args: argparse.Namespace) -> Iterator[Trial]:
    """Eight at once."""
    place = empty.copy("trial")
    started = [place.start(place.typed(name), None) for _ in range(8)]
    for pid in started:
        code = place.finish(pid)
        complete = code == 0 and place.number is None and "is complete" in place.lines
        fault = None if complete else place.judged(code, right)
        yield Trial("concurrency", name, f"process {started.index(pid) + 1} of 8", fault)


@contextmanager
def folder() -> Iterator[Path]:
    """Where all happens."""
    with tempfile.TemporaryDirectory(prefix="specomp-robustness-") as temporary:
        yield Path(temporary).resolve()


def tiny_folder(folder: Path) -> None:
    """A model folder for the streamed run: the random model of debug=tiny."""
    from specomp import rows
    from specomp.cache import Cache

    loaded = rows.built(rows.load("model", "tiny_llama"), "model").load(Cache(folder / "unused"))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    kinds = ("kills", "full", "damage", "flips", "concurrency")
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(kinds)}; all where none is named")
    parser.add_argument("--run", action="append", choices=RUNS, help="all where none is named")
    parser.add_argument("--every", type=int, default=1, help="only every n-th place")
    parser.add_argument("--trials", type=int, default=500, help="flips, over all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a file for the table")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(kinds):
        parser.error(f"no kind {', '.join(unknown)}: there are {', '.join(kinds)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "SPECOMP_FRESH_CHECK": "0", "OMP_NUM_THREADS": "1"}
    os.environ.pop("SPECOMP_DATA", None)
    import torch

    import specomp.experiment.pipeline
    import specomp.tables.table
    import specomp.training.fit  # noqa: F401

    torch.set_num_threads(1)
    os.chdir(ROOT)
    trials: list[Trial] = []
    with folder() as root:
        model = root / "model"
        if (
            pid := os.fork()
        ) == 0:  # torch computes nothing here: its threads do not survive a fork
            tiny_folder(model)
            os._exit(0)
        os.waitpid(pid, 0)
        for name in args.run or RUNS:
            empty = Place(root / "empty", model)
            whole = empty.copy("whole")
            assert whole.go(name) == 0, whole.lines
            right = whole.number
            more = whole.copy("more")
            assert more.go(name, MORE) == 0, more.lines
            wanted = more.number
            assert right and wanted, whole.lines
            tried: dict[str, Iterator[Trial]] = {  # begun when they are asked for
                "kills": interrupt("kills", name, empty, right, args),
                "full": interrupt("full", name, empty, right, args),
                "damage": damage(name, whole, wanted, args),
                "flips": flips(name, whole, wanted, args),
                "concurrency": concurrency(name, empty, right, args),
            }
            for kind in args.kinds or kinds:
                start = time.perf_counter()
                for number, trial in enumerate(tried[kind], start=1):
                    trials.append(trial)
                    if number % 50 == 0:
                        print(f"{kind}, {name}: {number} so far", flush=True)
                    if trial.fault:
                        print(f"FAULT  {trial.kind}, {trial.run}, {trial.what}: {trial.fault}")
                        sys.stdout.flush()
                seconds = time.perf_counter() - start
                done = [x for x in trials if (x.kind, x.run) == (kind, name)]
                held = sum(x.fault is None for x in done)
                print(f"{kind}, {name}: {held} of {len(done)} held, {seconds:.0f} s", flush=True)
    count = Counter((x.kind, x.run) for x in trials)
    good = Counter((x.kind, x.run) for x in trials if x.fault is None)
    rows = [f"| {kind} | {run} | {n} | {good[kind, run]} |" for (kind, run), n in count.items()]
    table = "\n".join(["| kind | run | tried | held |", "|---|---|---|---|", *rows]) + "\n"
    print(table)
    if args.write:
        args.write.write_text(table)
    return int(any(x.fault for x in trials))


if __name__ == "__main__":
    sys.exit(main())

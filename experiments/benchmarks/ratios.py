"""One compression ratio against five in one sweep: calibration and decomposition are paid once.
Evaluation and saving aside.

    python experiments/benchmarks/ratios.py model=smollm2_135m calibration=wikitext2_64x512

With calibration.precision=bfloat16 where the CPU has such products.
Arguments are overrides of run.py for every run. Each side starts with an empty cache, in a process
of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATIOS = (20, 30, 40, 50, 60)
STAGES = ("load", "calibrate", "allocate", "compress")
COMMON = ("method=svd_llm", "benchmark=none", "save=false")
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    known, overrides = parser.parse_known_args()
    common = [f"threads={known.threads}", *COMMON, *overrides]
    for _ in range(known.turns):
        one, five = sweep(RATIOS[:1], common), sweep(RATIOS, common)
        for name, (seconds, stages) in (("one ratio", one), ("five ratios", five)):
            spent = ", ".join(f"{stage} {spent:.1f}" for stage, spent in stages.items())
            print(f"{name}: {seconds:.1f} s; {spent}")
        alone = sum(five[1].values()) / sum(one[1].values())
        print(f"five / one: {five[0] / one[0]:.2f}; the stages alone: {alone:.2f}", flush=True)


def sweep(ratios: tuple[int, ...], overrides: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds of the command, start and imports included, and of its stages over all ratios."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"SPECOMP_CACHE": f"{folder}/cache", "SPECOMP_OUTPUTS": f"{folder}/outputs"}
        typed = [*overrides, f"ratio={','.join(f'cr{x}' for x in ratios)}"]
        command = [sys.executable, ROOT / "run.py", "-m", *typed]
        start = time.perf_counter()
        done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        stages = dict.fromkeys(STAGES, 0.0)
        for path in Path(folder, "outputs", "records").glob("*.json"):
            spent = json.loads(path.read_text())["seconds"]
            stages = {name: total + spent.get(name, 0.0) for name, total in stages.items()}
        return seconds, stages


if __name__ == "__main__":
    main()

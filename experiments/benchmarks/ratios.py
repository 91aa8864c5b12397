"""One compression ratio against five in one sweep: calibration and decomposition are paid once. Evaluation and saving aside.

    python experiments/benchmarks/ratios.py model=smollm2_135m calibration=wikitext2_64x512 calibration.precision=bfloat16

Arguments are overrides of run.py for every run. Each side starts with an empty cache, in a process of its own.
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
COMMON = ("method=svd_llm", "benchmark=none", "save=false")
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    known, overrides = parser.parse_known_args()
    for _ in range(known.turns):
        one, five = (sweep(ratios, [f"threads={known.threads}", *COMMON, *overrides]) for ratios in (RATIOS[:1], RATIOS))
        for name, (seconds, stages) in (("one ratio", one), ("five ratios", five)):
            print(f"{name}: {seconds:.1f} s; " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in stages.items()))
        print(f"five / one: {five[0] / one[0]:.2f}; the stages alone: {sum(five[1].values()) / sum(one[1].values()):.2f}", flush=True)


def sweep(ratios: tuple[int, ...], overrides: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds of the command, start and imports included, and of its stages over all ratios."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"SPECOMP_CACHE": f"{folder}/cache", "SPECOMP_OUTPUTS": f"{folder}/outputs"}
        typed = [*overrides, f"ratio={','.join(f'cr{x}' for x in ratios)}"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / "run.py", "-m", *typed], env=os.environ | places, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        records = [json.loads(path.read_text()) for path in Path(folder, "outputs", "records").glob("*.json")]
        stages: dict[str, float] = {}
        for record in records:
            for name, spent in record["seconds"].items():
                stages[name] = stages.get(name, 0.0) + spent
        return seconds, {name: spent for name, spent in stages.items() if name in ("load", "calibrate", "allocate", "compress")}


if __name__ == "__main__":
    main()

"""AdaSVD (arXiv:2502.01403) Figure 4: importance of every decoder layer, as adaCR sees it, for one
model after the other.

Block influence 1 - cos(input, output) of the layer over its mean (Eq. 18-19 with the sign that the
figure shows; INFERENCE, see adaCR). Writes <model>.csv here and draws every model that has one.

    python experiments/adasvd_figure4/importance.py model=smollm2_135m calibration=wikitext2_64x512

Arguments are overrides of run.py.
"""

import csv
import sys
from pathlib import Path

from specomp.compression.calibrate import calibrate
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.methods.adasvd import normalized_importance
from specomp.numerics.statistics import IOCosine
from specomp.tables.charts import importances

HERE = Path(__file__).parent


def main(overrides: list[str]) -> None:
    """Measure one model, draw all."""
    experiment = typed("method=adasvd", "benchmark=none", *overrides)
    run = run_of(experiment, experiment.source.load(experiment.cache))
    statistics = calibrate(run, {IOCosine()})
    cosine = {x.decoder_layer: float(statistics(x)[IOCosine()]) for x in run.linears}
    importance = normalized_importance(cosine, "block_influence")
    rows = [[i, f"{cosine[i]:.6f}", f"{importance[i]:.4f}"] for i in cosine]
    with (HERE / f"{experiment.choices['model']}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["decoder layer", "cosine", "importance"], *rows])
    drawn = {}
    for path in sorted(HERE.glob("*.csv")):
        with path.open(newline="") as file:
            drawn[path.stem] = [float(row["importance"]) for row in csv.DictReader(file)]
    (HERE / "importance.svg").write_text(importances(drawn))


if __name__ == "__main__":
    main(sys.argv[1:])

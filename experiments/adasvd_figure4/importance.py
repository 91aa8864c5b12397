"""AdaSVD (arXiv:2502.01403) Figure 4: importance of every decoder layer, as adaCR sees it, for one model after the other.

Block influence 1 - cos(input, output) of the layer over its mean (Eq. 18-19 with the sign that the figure shows; INFERENCE, see adaCR).
Writes <model>.csv here and draws every model that has one.

    python experiments/adasvd_figure4/importance.py model=smollm2_135m calibration=wikitext2_64x512   # Hydra overrides
"""

import csv
import sys
from pathlib import Path

from specomp.pipeline import load_dense
from specomp.results.charts import importances
from specomp.results.record import Record
from specomp.stages.calibrate import dense_statistics
from specomp.statistics import IOCosine

from specomp.experiment import typed
from specomp.methods.adasvd import normalized_importance

HERE = Path(__file__).parent


def main(overrides: list[str]) -> None:
    """Measure one model, draw all."""
    experiment = typed("method=adasvd", "benchmark=none", *overrides)
    setup = load_dense(experiment, Record(key="figure"))
    statistics = dense_statistics(setup, frozenset({IOCosine()}))
    cosine = {x.decoder_layer: float(statistics(x.name)[IOCosine()]) for x in setup.linears}
    importance = normalized_importance(cosine, "block_influence")
    with (HERE / f"{experiment.choices['model']}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["decoder layer", "cosine", "importance"], *([i, f"{cosine[i]:.6f}", f"{importance[i]:.4f}"] for i in cosine)])
    drawn = {}
    for path in sorted(HERE.glob("*.csv")):
        with path.open(newline="") as file:
            drawn[path.stem] = [float(row["importance"]) for row in csv.DictReader(file)]
    (HERE / "importance.svg").write_text(importances(drawn))


if __name__ == "__main__":
    main(sys.argv[1:])

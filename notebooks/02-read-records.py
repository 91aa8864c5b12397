# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading records
#
# A record is one JSON file per compressed model: what was asked for, what was counted, what was measured. Everything else is a
# query over records. These are the committed ones; `stored(None)` also finds your own in `outputs/records`.

# %%
from pathlib import Path

from matplotlib.figure import Figure

from specomp.experiment.record import COMMITTED, stored
from specomp.tables.sweep import load_sweep

records = stored([COMMITTED])
for record in records:
    asked, counted = record.counted.target_compression, record.counted.measured_retention
    print(record.key[:12], record.choices["method"], asked, counted, record.metrics)

# %% [markdown]
# A sweep finds its records by what its command line says.

# %%
OVERRIDES = [
    "model=smollm2_135m",
    "budget=cpu",
    "calibration.num_samples=256",
    "calibration.precision=bfloat16",
]
sweep = load_sweep(["soco_starts", *OVERRIDES], records)
column = sweep.columns[-1]
for point in sweep.points:
    print(point.keys, point.values(column))

# %% [markdown]
# A figure as papers draw it.

# %%
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for start in ("none", "gram"):
    chosen = [p for p in sweep.points if p.keys["method/whitening"] == start and p.done]
    compressions = [p.done[0].counted.target_compression for p in chosen]
    axes.plot(
        compressions, [p.values(column)[0] for p in chosen], marker="o", label=f"start: {start}"
    )
axes.axhline(sweep.dense(column), color="0.5", linestyle=":", label="dense")
axes.set(
    xlabel="compression (fraction of the linears' parameters removed)",
    ylabel="WikiText-2 perplexity",
    yscale="log",
    title="SoCo",
)
axes.legend()
figure

# %% [markdown]
# Beside each record: one line per linear.

# %%
import csv

path = Path(COMMITTED) / f"{sweep.records[0].key[:12]}.linears.csv"
with path.open(newline="") as file:
    linears = list(csv.DictReader(file))
print(len(linears), "linears; the first:", linears[0])

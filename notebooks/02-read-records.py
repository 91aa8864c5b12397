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

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from specomp.experiment.record import COMMITTED, stored
from specomp.tables.sweep import load_sweep

pd.options.display.float_format = "{:,.4g}".format
pd.options.display.max_colwidth = 60
plt.rcParams |= {"figure.dpi": 75, "axes.spines.top": False, "axes.spines.right": False}

records = stored([COMMITTED])
print(f"{len(records)} records")

# %% [markdown]
# A few of their fields. `changed` is what differs from the method's row in `conf/method`; retention is stored parameters of the linears of the decoder layers over
# those of the dense model; perplexity is on the test text of WikiText-2. Where it is above the size of the vocabulary (49,152 here), the model is worse than
# guessing, which the record calls collapsed. Here are two records of each method; records differ in calibration and precision too, so compare within a sweep.


# %%
def wikitext2(record):
    """The result on WikiText-2: float32 and bfloat16 products are benchmarks of their own."""
    return next((v for k, v in record.metrics.items() if k.startswith("wikitext2@")), {})


frame = pd.DataFrame(
    {
        "record": x.key[:12],
        "method": x.label("method"),
        "changed": " ".join(x.changes),
        "removed": x.counted.target_compression,
        "retention": x.counted.measured_retention,
        "perplexity": wikitext2(x).get("ppl"),
        "collapsed": bool(wikitext2(x).get("collapsed")),
    }
    for x in records
).sort_values(["method", "changed", "removed", "record"])
frame.groupby("method").head(2).set_index("record")

# %% [markdown]
# ## A sweep
#
# finds its records by what its command line says: any line of `python run.py -m ...`, without a model or a text at hand. A point is one job, with its record if there
# is one; a column is one metric of a benchmark. As a printed table: `specomp table` with the same words.

# %%
METHODS = ("svd_llm", "adasvd", "two_sided", "specomp")
sweep = load_sweep(
    [
        "model=smollm2_135m",
        "budget=cpu_bf16",
        "calibration=wikitext2",
        "benchmark=wikitext2",
        f"method={','.join(METHODS)}",
        "ratio=cr20,cr40,cr60",
    ],
    records,
)
column = sweep.columns[0]
cells = [
    {"method": x.keys["method"], "removed": x.keys["ratio"], column.label: x.mean(column)}
    for x in sweep.points
]
pd.DataFrame(cells).pivot(index="method", columns="removed", values=column.label).loc[[*METHODS]]

# %% [markdown]
# As a figure. SmolLM2-135M, calibrated on 64 x 512 tokens of WikiText-2's validation text, measured on 24 windows of 512 tokens of its test text (12,264 predicted tokens).
# All four count the same stored parameters; `specomp` stores pivot rows and coefficients, the others two factors.


# %%
def draw(lines, dense, xlabel, title):
    """Perplexity, on a logarithmic axis; lines: (places, values) by name."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, (places, values) in lines.items():
        axes.plot(places, values, marker="o", label=name)
    axes.axhline(dense, color="0.5", linestyle=":", label="dense")
    axes.set(xlabel=xlabel, ylabel="WikiText-2 perplexity", yscale="log", title=title)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right center", frameon=False)
    plt.show()


lines = {}
for method in METHODS:
    done = [x for x in sweep.points if x.keys["method"] == method and x.done]
    lines[method] = [x.retention for x in done], [x.mean(column) for x in done]
draw(
    lines,
    sweep.dense(column),
    "retention (stored share of the linears' parameters)",
    "Without training",
)

# %% [markdown]
# ## The sweep of an experiment
#
# An experiment in `conf/experiment` is a sweep with a name. This one is SoCo, which trains a gate for every component, from the plain SVD (as its paper does) and from
# the norm of the inputs. 256 x 512 calibration tokens; measured on the same 12,264 tokens.

# %%
soco = load_sweep(
    [
        "soco_starts",
        "model=smollm2_135m",
        "budget=cpu",
        "calibration.num_samples=256",
        "calibration.precision=bfloat16",
    ],
    records,
)
column = soco.columns[-1]
lines = {}
for start, name in {"none": "from the SVD of W", "gram": "from the norm\nof the inputs"}.items():
    done = [x for x in soco.points if x.keys["method/whitening"] == start and x.done]
    removed = [x.done[0].counted.target_compression for x in done]
    lines[name] = removed, [x.mean(column) for x in done]
draw(
    lines,
    soco.dense(column),
    "compression (fraction of the linears' parameters removed)",
    "SoCo, trained",
)

# %% [markdown]
# ## One line per linear
#
# Beside each record is a csv file. `norm_error` is relative, in the method's own norm; `spectrum` has singular values over the largest.

# %%
point = next(x for x in sweep.points if x.keys == {"method": "specomp", "ratio": "cr40"})
linears = pd.read_csv(Path(COMMITTED) / f"{point.done[0].key[:12]}.linears.csv")
linears[["name", "m", "n", "rank", "stored", "dense", "norm_error"]].head(7)

# %%
linears["layer"] = linears["name"].str.extract(r"\.(\d+)\.", expand=False).astype(int)
linears["kind"] = linears["name"].str.rpartition(".")[2]
linears["share"] = linears["stored"] / (linears["m"] * linears["n"])
shares = linears.pivot(index="kind", columns="layer", values="share").loc[linears["kind"].unique()]
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1)
axes.set_yticks(range(len(shares)), shares.index)
axes.set(xlabel="decoder layer", title="specomp at 40 %: where its parameters go")
figure.colorbar(image, label="stored share")
plt.show()

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
# # Singular spectra, and what whitening changes
#
# A rank-r matrix that is close to W is not the one whose outputs are close to those of W: inputs have directions that matter and
# directions that hardly occur. In the norm of the inputs, ||(W' - W) S|| with S S^T = X X^T, the singular values fall faster, and
# what is lost is what never came in.

# %%
from matplotlib.figure import Figure

from specomp.compression.calibrate import calibrate
from specomp.experiment.config import typed
from specomp.experiment.pipeline import run_of
from specomp.numerics.factors import truncate

SHOWN = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")

# %% [markdown]
# The embedded model and 16 samples of 128 tokens of English text, both offline. Any override of the command line works here.

# %%
samples = ("calibration.num_samples=16", "calibration.length=128")
experiment = typed("method=svd_llm", *samples, "benchmark=none")
run = run_of(experiment, experiment.source.load(experiment.cache))
statistics = calibrate(run)  # those that the method reads, of every linear

# %% [markdown]
# One decoder layer from the middle: relative singular values of W itself (dashed) and in the norm of its inputs (solid).

# %%
layer = len(run.layers) // 2
linears = [x for x in run.linears if x.decoder_layer == layer and x.name.endswith(SHOWN)]
figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
spectra = {}
for linear in linears:
    W = run.model.get_submodule(linear.name).weight.detach()
    whitened = run.method.whitening(statistics(linear)).decompose(W)
    plain = W.svd().S
    spectra[linear.name] = whitened
    label = linear.name.rpartition(".")[2]
    (line,) = axes.plot(whitened.s / whitened.s[0], label=label)
    axes.plot(plain / plain[0], linestyle="--", color=line.get_color())
axes.set(xlabel="component", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1))
axes.legend()
figure

# %% [markdown]
# What is lost at the rank of 40 % compression, on the inputs: truncating W, against truncating in their norm.

# %%
rows = []
for linear in linears:
    W = run.model.get_submodule(linear.name).weight.detach()
    norm = run.method.whitening(statistics(linear))
    rank = int(0.6 * linear.m * linear.n / (linear.m + linear.n))
    U, s, V = W.svd()
    plain = (U[:, :rank] * s[:rank]) @ V[:, :rank].T
    best = truncate(spectra[linear.name], rank).product()
    whole = norm.loss(W)
    rows.append(
        (
            linear.name.rpartition(".")[2],
            rank,
            norm.loss(plain - W) / whole,
            norm.loss(best - W) / whole,
        )
    )
for name, rank, plain, best in rows:
    print(
        f"{name:10s} rank {rank:4d}: relative output error {plain:.3f} by SVD of W, {best:.3f} in the norm of the inputs"
    )

# %%
assert all(best <= plain for _, _, plain, best in rows), "Eckart-Young"

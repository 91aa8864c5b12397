"""The library: a model and tokens in, a compressed model and a report out. READ THIS FIRST.

    report = specomp.compress(model, tokens, method="adasvd", ratio=0.4)
    specomp.save(model, "folder", tokenizer=tokenizer)

What a compression does is five steps, each a file: compression/route.py decides what is read where,
calibrate.py takes the statistics, spectra.py decomposes in the method's norm, forms/options.py
prices what an allocation (methods/) chooses among, loop.py fits, repairs, rounds and installs it
decoder layer by decoder layer.
"""

import logging
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specomp import rows
from specomp.cache import Cache, checksum, digest
from specomp.compression.calibrate import calibrate
from specomp.compression.checks import check_budget, check_method
from specomp.compression.loop import compress as compress_calibrated
from specomp.compression.report import Report
from specomp.compression.run import Progress, Run
from specomp.compression.search import apart
from specomp.data.calibration import Calibration, CalibrationSet
from specomp.errors import UserError
from specomp.evaluation.perplexity import mean_perplexity
from specomp.forms.prices import Bits, Budget, Divergence, Numbers
from specomp.models.families import family_of
from specomp.models.identity import Form
from specomp.models.load import LoadedModel
from specomp.models.modules import Substitute, evaluating
from specomp.models.registration import adopt
from specomp.models.save import load as load_folder
from specomp.models.save import save_compressed
from specomp.slots import Method, Rounding

log = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel,
    tokens: Tensor | CalibrationSet,
    method: str | Method = "adasvd",
    ratio: float | str | Budget = 0.4,
    *,
    calibration: Mapping[str, Any] | Calibration | None = None,
    training_tokens: Tensor | CalibrationSet | None = None,
    quantizer: str | Rounding | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Compress `model` in place; its parameters need no gradient afterwards.

    tokens: what to calibrate on, int64 (samples, length) from the model's own tokenizer. method: a
    row's name (see `method_names`), `specomp.method(...)`, or a `Method` of your own slots. ratio:
    the fraction of the decoder layers' linear weights to remove, in [0, 1), a choice of conf/ratio,
    or
    `Numbers(compression=...)`, or `Bits(bits=...)`: stored bits a weight; "kl0_05" or
    `Divergence(kl=0.05)` is the fewest bits at which the model stays that close, measured on the
    last 8 of the tokens. calibration: settings
    other than those of conf/calibration/_base.yaml (batch_size, upstream, layers_at_once,
    accumulate, precision). training_tokens: what a row that trains reads, where that is not
    `tokens`. quantizer: a choice of conf/quantizer; None: the method's own, and under a budget of
    bits "grids" where that is none. cache: a folder in which statistics and spectra
    are kept for other methods and ratios; None: a temporary one. Raises UserError, in general
    before anything is changed.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model is a {type(model).__name__}: give a loaded model of transformers, such as"
            " AutoModelForCausalLM.from_pretrained(...)."
        )
    family = family_of(model.config)
    if any(isinstance(x, Substitute) for x in model.modules()):
        raise UserError("This model is compressed already: compress its dense original.")
    away = next((name for name, x in model.named_parameters() if x.is_meta), None)
    if away is not None:
        raise UserError(
            f"{away} is not in memory: load the model without stream=True or offloading."
            " Larger than memory it is compressed by `specomp model.stream=true`."
        )
    budget = budget_of(ratio)
    chosen = method_of(method, quantizer, budget)
    settings = calibration_of(calibration)
    samples, held = _samples(model, tokens, settings), None
    if chosen.spends:
        samples, held = apart(samples, budget)
    more = samples if training_tokens is None else _samples(model, training_tokens, settings)
    dtype = str(model.dtype).removeprefix("torch.")
    check_method(chosen, budget, settings.upstream, samples.num_samples, 1, dtype)
    check_budget(model, family, chosen, budget)
    if chosen.training.active:
        chosen.training.check(chosen, budget, more.num_samples, 1, dtype)
    with ExitStack() as stack:
        root = (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="specomp-"))
            if cache is None
            else cache
        )
        stack.enter_context(evaluating(model))
        run = Run(
            model=model,
            family=family,
            method=chosen,
            budget=budget,
            calibration=settings,
            samples=samples,
            training_samples=more,
            held_out=held,
            cache=Cache(root),
            model_key="only this one" if cache is None else model_key(model),
            seed=seed,
            trainer=(
                rows.built(rows.load("trainer", "default"), "trainer")
                if chosen.training.active
                else None
            ),
            progress=progress or Progress(),
        )
        with run.progress.stage("calibrate"):
            statistics = calibrate(run)
        report = compress_calibrated(run, statistics)
    if not all(x.dense for x in report.linears):
        adopt(model)
    return report


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    form: Form = "factors",
    report: Report | None = None,
) -> Path:
    """Write a folder that `from_pretrained` loads, and `load` below; form "dense" merges factors
    into plain linears, "gguf" (float16) and "gguf_q8_0" write those as one file for llama.cpp.

    Before it gets its name the folder is opened again, and has to compute what the model does; once
    a kind also in a process without specomp (some seconds; SPECOMP_FRESH_CHECK=0 leaves that out).
    report: what its specomp.json should say. Raises UserError where the folder holds something
    else, the model cannot be opened again, or the disk is full.
    """
    info = (
        {}
        if report is None
        else {**report.made, "ledger": report.ledger.as_dict(), "notes": report.notes}
    )
    save_compressed(model, tokenizer, Path(folder), form=form, info=info)
    return Path(folder)


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    device_map: str | None = None,
    stream: bool = False,
) -> LoadedModel:
    """The model and tokenizer of a folder that was saved; see specomp.models.save.load."""
    return load_folder(folder, dtype=dtype, device=device, device_map=device_map, stream=stream)


def perplexity(model: PreTrainedModel, tokens: Tensor, *, batch_size: int = 1) -> float:
    """exp of the mean loss over all predictions in windows of token ids, int64 (windows, length):
    length - 1 each.

    inf or nan where a window's is; nothing is left out.
    """
    return mean_perplexity(model, tokens, batch_size)


def model_key(model: PreTrainedModel) -> str:
    """What a model's numbers are known by in a cache: a checksum of all of them, and its config."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return digest({"weights": checksum(state), "config": model.config.to_dict()})


def method_of(method: str | Method, quantizer: str | Rounding | None, budget: Budget) -> Method:
    """A row by its name, or a method, with a quantizer. None: the method's own; where that rounds
    nothing, what the budget is spent with.
    """
    row = rows.method(method) if isinstance(method, str) else method
    if quantizer is None:
        if row.rounding.grids or not row.spends or budget.quantizer == "none":
            return row
        quantizer = budget.quantizer
    rounding = (
        rows.built(rows.load("quantizer", quantizer), "quantizer")
        if isinstance(quantizer, str)
        else quantizer
    )
    return Method(**{**vars(row), "rounding": rounding})


def calibration_of(calibration: Mapping[str, Any] | Calibration | None) -> Calibration:
    """Settings over those of conf/calibration/_base.yaml."""
    if isinstance(calibration, Calibration):
        return calibration
    base = {
        x: y
        for x, y in rows.load("calibration", "_base").items()
        if x in Calibration.__dataclass_fields__
    }
    try:
        return Calibration(**{**base, **(calibration or {})})
    except ValidationError as error:
        raise UserError(
            "; ".join(f"calibration.{x['loc'][0]}={x['input']}: {x['msg']}" for x in error.errors())
            + "."
        ) from error


def budget_of(ratio: float | str | Budget) -> Budget:
    """A fraction to remove is one of parameters; a name is a choice of conf/ratio."""
    if isinstance(ratio, str):
        made: Budget = rows.built(rows.load("ratio", ratio), "ratio")
        return made
    if not isinstance(ratio, (int, float)):
        return ratio
    if not 0 <= ratio < 1:
        raise UserError(
            f"ratio={ratio}: the fraction of parameters to remove is in [0, 1); bits a weight are"
            " specomp.Bits(bits=...)."
        )
    return Numbers(compression=float(ratio))


def _samples(
    model: PreTrainedModel, tokens: Tensor | CalibrationSet, settings: Calibration
) -> CalibrationSet:
    if isinstance(tokens, CalibrationSet):
        return tokens
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim != 2
        or tokens.dtype != torch.int64
        or tokens.shape[0] < 1
        or tokens.shape[1] < 2
    ):
        found = (
            f"{tuple(tokens.shape)} of {tokens.dtype}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise UserError(
            "tokens must be int64 ids (samples, length), at least one sample of two tokens; this"
            f" is {found}."
        )
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    context = getattr(model.config, "max_position_embeddings", None)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(
            f"tokens go from {int(tokens.min())} to {int(tokens.max())}, the model's embedding has"
            f" rows 0 to {vocabulary - 1}."
        )
    if context is not None and tokens.shape[1] > context:
        raise UserError(
            f"Samples of {tokens.shape[1]} tokens do not fit the model's context of {context}: give"
            " shorter ones."
        )
    return CalibrationSet(
        tokens.cpu(),  # type: ignore[arg-type]
        description={"tokenizer": {"sha256": "token ids"}},
        batch_size=settings.batch_size,
    )


__all__ = [
    "Bits",
    "Calibration",
    "Divergence",
    "Method",
    "Numbers",
    "Progress",
    "Report",
    "compress",
    "load",
    "perplexity",
    "save",
]

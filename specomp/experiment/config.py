"""What a run works with: every choice of the command line as an object, checked before any model is
loaded.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from specomp.cache import Cache, digest
from specomp.compression.checks import check_method
from specomp.compression.route import Route
from specomp.compression.search import apart, besides
from specomp.data.calibration import CalibrationSet, CalibrationSpec
from specomp.data.token_ids import embedding_rows
from specomp.evaluation.divergence import DenseModel
from specomp.evaluation.suite import Suite
from specomp.experiment.checks import (
    check_export,
    check_machine,
    check_packed,
    check_streamed,
)
from specomp.experiment.completed import completed
from specomp.experiment.environment import plain_config
from specomp.experiment.making import make
from specomp.experiment.names import method_identity, without_later
from specomp.experiment.options import Options
from specomp.experiment.record import RecordStore
from specomp.experiment.tracking import Tracking
from specomp.forms.prices import Budget
from specomp.models.families import needs_bos
from specomp.models.sources import Source
from specomp.settings import CONF
from specomp.slots import Method, describe


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked; no text, tokenizer or weights have been looked at."""

    source: Source
    method: Method
    ratio: Budget
    calibration: CalibrationSpec
    suite: Suite
    trainer: Callable[..., L.Trainer]
    processes: int  # that train
    tracking: Tracking
    options: Options
    cache: Cache
    outputs: Path
    records: RecordStore
    choices: dict[str, str]
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Experiment(Request):
    """Everything a run needs, checked, with no model loaded yet."""

    samples: CalibrationSet
    training_samples: CalibrationSet  # the same, unless the training asks for more of the text
    held_out: CalibrationSet | None  # what a budget that is met by a search measures on
    tokenizer: Any

    def identity(self, *, dense: bool = False) -> dict[str, Any]:
        """What determines the weights: the dense model's are the source's alone."""
        model = self.source.fingerprint(self.cache)
        if dense or self.method.is_dense:
            return {"model": model, "method": "dense"}
        more = (
            {}
            if self.training_samples is self.samples
            else {"training_samples": self.training_samples.hash}
        )
        if self.held_out is not None:
            more["held_out_samples"] = self.held_out.hash
        return more | {
            "model": model,
            "method": method_identity(self.method),
            **(self.ratio.identity() if self.method.spends else {}),
            "calibration": self.samples.hash,
            "upstream": self.calibration.upstream,
            "precision": [self.calibration.precision, self.calibration.accumulate],
            "quantizer": without_later(describe(self.method.rounding)),
            "seed": self.options.seed,
        }


def ask(cfg: DictConfig) -> Request:
    """Instantiate every choice, which checks types and ranges, and check what depends on several of
    them. Raises UserError.
    """
    options: Options = make(cfg, "options")
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, workers=True, verbose=False)
    outputs = Path(str(cfg.paths.outputs)).expanduser().absolute()
    parts = {
        name: make(cfg, name)
        for name in ("quantizer", "ratio", "calibration", "trainer", "tracking")
    }
    del parts["quantizer"]  # made for its messages; what counts is the method's
    parts["method"] = make(cfg, "method", rounding=cfg.quantizer)
    parts["calibration"] = parts["calibration"].moved(options.seed)
    source, suite = make(cfg, "model"), make(cfg, "benchmark")
    processes = 1 if options.elsewhere else check_machine(source, parts["trainer"])
    route = check_request(
        parts["method"], parts["ratio"], parts["calibration"], processes, source.dtype
    )
    check_packed(parts["method"], options)
    check_streamed(source, parts["method"], parts["ratio"], route, options, suite)
    cache = Cache(str(cfg.paths.cache))
    architecture = source.config_for_plan(cache)
    check_export(architecture, parts["method"], options)
    return Request(
        source=source,
        suite=suite.for_model(architecture),
        options=options,
        processes=processes,
        cache=cache,
        outputs=outputs,
        records=RecordStore(outputs / "records"),
        choices={
            name: str(choice)
            for name, choice in HydraConfig.get().runtime.choices.items()
            if not name.startswith("hydra/")
        }
        | ({"quantizer": "none"} if parts["method"].is_dense else {}),
        config={
            **plain_config(cfg),
            "overrides": list(HydraConfig.get().overrides.task),
        },
        **parts,
    )


def check_request(
    method: Method, budget: Budget, spec: CalibrationSpec, processes: int, dtype: str
) -> Route:
    """What the library checks, before any text is read. Raises UserError.

    Whether there are enough samples where all of a token file's are asked for, `build` checks.
    """
    return check_method(
        method, budget, spec.upstream, spec.num_samples or sys.maxsize, processes, dtype
    )


def build(cfg: DictConfig) -> Experiment:
    """What was asked for, with the texts it needs. Raises UserError."""
    request = ask(cfg)
    context = request.source.max_length(request.cache)
    request.suite.validate(context)
    tokenizer = request.source.tokenizer(request.cache)
    config = request.source.config_for_plan(request.cache)
    rows = embedding_rows(config)
    request.suite.check_tokens(tokenizer, rows)
    drawing: dict[str, Any] = {
        "max_length": context,
        "vocab_size": rows,
        "needs_bos": needs_bos(config),
    }
    samples = training_samples = request.calibration.build(tokenizer, **drawing)
    method = request.method
    check_method(
        method,
        request.ratio,
        request.calibration.upstream,
        samples.num_samples,
        request.processes,
        request.source.dtype,
    )
    wanted = method.training.samples_of(samples.num_samples)
    if wanted not in (0, samples.num_samples):
        training_samples = replace(request.calibration, num_samples=wanted).build(
            tokenizer, **drawing
        )
    held = None
    more = request.ratio.held_out if method.spends else 0
    if more and request.calibration.num_samples:
        # more of the same text, so that statistics and options serve budgets of bits too
        wider = replace(request.calibration, num_samples=request.calibration.num_samples + 2 * more)
        held = besides(samples, wider.build(tokenizer, **drawing), more)
    elif more:  # all that a file has
        samples, held = apart(samples, request.ratio)
        training_samples = samples
    cache = request.cache
    dense = DenseModel(cache, digest(request.source.fingerprint(cache)))
    return Experiment(
        **vars(replace(request, suite=request.suite.beside(dense))),
        samples=samples,
        training_samples=training_samples,
        held_out=held,
        tokenizer=tokenizer,
    )


def composed(*overrides: str) -> DictConfig:
    """What `python run.py overrides...` composes; also sets Hydra's own config, as run.py does."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return completed(cfg)


def typed(*overrides: str) -> Experiment:
    """What `python run.py overrides...` would build: for notebooks and scripts. Raises
    UserError.
    """
    return build(composed(*overrides))

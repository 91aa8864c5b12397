"""What a run works with: every choice of the command line as an object, checked before any model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from specomp.cache import Cache
from specomp.checks import check_machine, check_precision, check_quantizer, check_streamed, check_training, make
from specomp.data.calibration import CalibrationSet, CalibrationSpec
from specomp.evaluation.suite import Suite
from specomp.methods.base import Method, Quantizer, describe
from specomp.models.sources import Source
from specomp.options import Options
from specomp.phases import Distillation
from specomp.ratio import Ratio
from specomp.results.record import RecordStore
from specomp.results.tracking import Tracking
from specomp.stages.compress import dense_needs


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked; no text, tokenizer or model has been looked at."""

    source: Source
    method: Method
    ratio: Ratio
    calibration: CalibrationSpec
    suite: Suite
    quantizer: Quantizer
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
    tokenizer: Any

    def identity(self, *, dense: bool = False) -> dict[str, Any]:
        """What determines the weights: the dense model's are the source's alone."""
        model = self.source.fingerprint(self.cache)
        if dense or self.method.is_dense:
            return {"model": model, "method": "dense"}
        more = {} if self.training_samples is self.samples else {"training_samples": self.training_samples.hash}
        return more | {
            "model": model,
            "method": describe(self.method) | {"name": None},
            "compression": self.ratio.compression,
            "calibration": self.samples.hash,
            "upstream": self.calibration.upstream,
            "precision": [self.calibration.precision, self.calibration.accumulate],
            "quantizer": describe(self.quantizer),
            "seed": self.options.seed,
        }


def ask(cfg: DictConfig) -> Request:
    """Instantiate every choice, which checks types and ranges, and check what depends on several of them. Raises UserError."""
    options: Options = make(cfg, "options")
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, workers=True, verbose=False)
    outputs = Path(str(cfg.paths.outputs)).expanduser().absolute()
    parts = {name: make(cfg, name) for name in ("method", "ratio", "calibration", "quantizer", "trainer", "tracking")}
    needs = dense_needs(parts["method"], parts["calibration"].upstream, parts["quantizer"])
    check_quantizer(parts["method"], parts["quantizer"], options)
    source, suite = make(cfg, "model"), make(cfg, "benchmark")
    check_precision(source, parts["method"])
    check_streamed(source, parts["method"], needs, options, suite)
    return Request(
        source=source,
        suite=suite,
        options=options,
        processes=check_machine(source, parts["trainer"]),
        cache=Cache(str(cfg.paths.cache)),
        outputs=outputs,
        records=RecordStore(outputs / "records"),
        choices={name: str(choice) for name, choice in HydraConfig.get().runtime.choices.items() if not name.startswith("hydra/")},
        config={**OmegaConf.to_container(cfg, resolve=True), "overrides": list(HydraConfig.get().overrides.task)},  # type: ignore[dict-item]
        **parts,
    )


def build(cfg: DictConfig) -> Experiment:
    """What was asked for, with the texts it needs. Raises UserError."""
    request = ask(cfg)
    context = request.source.max_length(request.cache)
    request.suite.validate(context)
    tokenizer = request.source.tokenizer(request.cache)
    samples = training_samples = request.calibration.build(tokenizer, max_length=context)
    training = request.method.training
    if training.trains != "nothing":
        check_training(request.method, request.calibration.upstream, samples.num_samples, request.processes)
        assert isinstance(training, Distillation)
        wanted = training.samples_of(samples.num_samples)
        if wanted != samples.num_samples:
            training_samples = replace(request.calibration, num_samples=wanted).build(tokenizer, max_length=context)
    return Experiment(**vars(request), samples=samples, training_samples=training_samples, tokenizer=tokenizer)


def composed(*overrides: str) -> DictConfig:
    """What `python run.py overrides...` composes; also sets Hydra's own config, as run.py does."""
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def typed(*overrides: str) -> Experiment:
    """What `python run.py overrides...` would build: for notebooks and scripts. Raises UserError."""
    return build(composed(*overrides))

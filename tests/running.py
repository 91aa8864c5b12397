"""Whole experiments in this process: configs composed as the command line does, on tiny models, in
a folder of the test's own.
"""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tiny import VOCAB, tiny_model

from specomp import rows
from specomp.cache import Cache
from specomp.compression.run import Progress, Run
from specomp.data.calibration import Calibration, CalibrationSet
from specomp.experiment.config import build, composed
from specomp.experiment.pipeline import run
from specomp.experiment.record import Record, RecordStore, record_key
from specomp.forms.prices import Numbers
from specomp.models.families import family_of
from specomp.slots import Method

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def compose_config(folder: Path, *overrides: str) -> DictConfig:
    """What `python run.py debug=tiny ...` composes, with cache and outputs in `folder`; also sets
    Hydra's own config, as run.py does.
    """
    paths = [
        f"paths.cache={folder / 'cache'}",
        f"paths.outputs={folder / 'outputs'}",
        "paths.data=null",
    ]
    return composed("debug=tiny", *paths, *overrides)


def compose_run(folder: Path, *overrides: str) -> Record:
    """Run one experiment and read back its record."""
    cfg = compose_config(folder, *overrides)
    run(cfg)
    return stored_record(folder, cfg)


def stored_record(folder: Path, cfg: DictConfig) -> Record:
    """The record of a config that ran."""
    record = store(folder).load(key_of(cfg))
    assert record is not None, "no record was written"
    return record


def key_of(cfg: DictConfig) -> str:
    """The key of the record a config asks for."""
    return record_key(build(cfg).identity())


def store(folder: Path) -> RecordStore:
    """The records of `compose_run`."""
    return RecordStore(folder / "outputs" / "records")


def random_tokens(num_samples: int, length: int, *, seed: int = 0) -> torch.LongTensor:
    """Ids (num_samples, length) over the whole vocabulary of the tiny models."""
    return torch.randint(
        0, VOCAB, (num_samples, length), generator=torch.Generator().manual_seed(seed)
    )  # type: ignore[return-value]


def make_run(
    family_name: str,
    cache: Cache,
    *,
    method: Method | str = "svd",
    compression: float = 0.4,
    num_samples: int = 5,
    length: int = 24,
    batch_size: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
    **calibration: Any,
) -> Run:
    """What the core works on, around a tiny model and random tokens; `calibration`: upstream,
    layers_at_once, accumulate, precision.
    """
    model = tiny_model(family_name, seed=seed)
    settings = {
        "upstream": "dense",
        "layers_at_once": None,
        "accumulate": "float32",
        "precision": "float32",
    } | calibration
    samples = CalibrationSet(
        random_tokens(num_samples, length),
        description={"tokenizer": {"sha256": "tiny"}},
        batch_size=batch_size,
    )
    return Run(
        model=model,
        family=family_of(model.config),
        method=rows.method(method) if isinstance(method, str) else method,
        budget=Numbers(compression=compression),
        calibration=Calibration(batch_size=batch_size, **settings),
        samples=samples,
        training_samples=samples,
        cache=cache,
        model_key=f"{family_name}-{seed}",
        trainer=trainer_factory(),
        progress=progress or Progress(),
    )


def trainer_factory() -> Any:
    """The loop of conf/trainer/default.yaml."""
    return instantiate(OmegaConf.load(CONF / "trainer" / "default.yaml"))

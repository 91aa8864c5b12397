"""Whole experiments in this process: configs composed as the command line does, on tiny models, in a folder of the test's own."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tiny import VOCAB, tiny_model, tiny_tokenizer

from specomp.cache import Cache
from specomp.data.calibration import CalibrationSet, TokenFile
from specomp.experiment.config import composed
from specomp.models.families import family_of
from specomp.experiment.pipeline import build, run
from specomp.experiment.record import Record, RecordStore, record_key
from specomp.compression.run import Setup

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def compose_config(folder: Path, *overrides: str) -> DictConfig:
    """What `python run.py debug=tiny ...` composes, with cache and outputs in `folder`; also sets Hydra's own config, as run.py does."""
    paths = [f"paths.cache={folder / 'cache'}", f"paths.outputs={folder / 'outputs'}", "paths.data=null"]
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
    return torch.randint(0, VOCAB, (num_samples, length), generator=torch.Generator().manual_seed(seed))  # type: ignore[return-value]


def make_setup(
    family_name: str, cache: Cache, *, num_samples: int = 5, length: int = 24, batch_size: int = 2, seed: int = 0, **calibration: Any
) -> Setup:
    """A stage's setup around a tiny model and random tokens; `calibration`: upstream, window, accumulate, precision."""
    model = tiny_model(family_name, seed=seed)
    settings = {"upstream": "dense", "window": None, "accumulate": "float32", "precision": "float32"} | calibration
    family = family_of(model.config)
    return Setup(
        model=model,
        tokenizer=tiny_tokenizer(),
        family=family,
        linears=family.linears(model),
        calibration=TokenFile(num_samples=None, length=None, batch_size=batch_size, path=Path("unused"), **settings),
        samples=CalibrationSet(random_tokens(num_samples, length), description={"tokenizer": {"sha256": "tiny"}}, batch_size=batch_size),
        cache=cache,
        model_key=f"{family_name}-{seed}",
        trainer=trainer_factory(),
    )


def trainer_factory() -> Any:
    """The loop of conf/trainer/default.yaml."""
    return instantiate(OmegaConf.load(CONF / "trainer" / "default.yaml"))

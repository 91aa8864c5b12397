"""What a composed config leaves to be said: whoever composes one has it completed here, so that a
run, its point in a table and its plan are of the same config.
"""

import copy
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from specomp.errors import UserError
from specomp.experiment.environment import forget_empty, remember
from specomp.experiment.guard import LONGEST, check_config


def completed(cfg: DictConfig) -> DictConfig:
    """The config with the text that corpus=NAME puts in place of others, and with a name for a
    model that has none; checked for what no run can work with. Raises UserError.
    """
    forget_empty()
    remember(cfg)
    made = copy.deepcopy(cfg)
    with open_dict(made):
        if made.model.name is None:
            made.model.name = _called(made.model)
        if made.get("corpus") is not None:
            put_corpus(made)
    check_config(made)
    return made


def _called(model: DictConfig) -> str | None:
    """The last part of where a model is, as far as it can be part of a folder's name."""
    place = next((x for x in ("repo", "path") if x in model), None)
    if place is None or OmegaConf.is_missing(model, place) or model[place] is None:
        return None
    last = Path(str(model[place])).expanduser().absolute().name
    return re.sub(r"[^\w.+=-]+", "_", last).lstrip(".-")[:LONGEST] or None


def put_corpus(cfg: DictConfig) -> None:
    """In place of the text that the calibration names, and of those which the benchmark measures
    on; each keeps its split.
    """
    corpus = cfg.corpus
    missing = [f"corpus.{key}=VALUE" for key in corpus if OmegaConf.is_missing(corpus, key)]
    if missing:
        raise UserError(f"corpus={corpus.name} needs {', '.join(missing)}.")
    if "corpus" not in cfg.calibration:
        raise UserError(
            f"corpus={corpus.name}: this calibration does not read one text; choose another, such"
            " as calibration=pydocs, or replace a part: corpus@calibration.parts.NAME.corpus=..."
        )
    for place in (cfg.calibration, *(cfg.benchmark.get("parts") or {}).values()):
        if "corpus" in place:
            place.corpus = OmegaConf.merge(corpus, {"split": place.corpus.split})

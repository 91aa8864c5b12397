"""Hydra's compose, quicker: what groups make is composed once, and the values that a test types are
put into a copy, as Hydra itself does it last. Imported before anything that composes.
"""

import copy
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from specomp.settings import CONF

COMPOSE = hydra.compose
composed: dict[Any, DictConfig] = {}


def is_value(override: Override) -> bool:
    """Whether it sets a value of what is composed already, and nothing else."""
    key = override.key_or_group
    plain = not (override.is_add() or override.is_delete() or override.is_sweep_override())
    plain = plain and override.package is None and not key.startswith("hydra")
    return plain and not (CONF / key.partition("@")[0]).is_dir()


def compose(
    config_name: str | None = None, overrides: Any = (), return_hydra_config: bool = False
) -> DictConfig:
    """As hydra.compose."""
    typed = list(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(typed)
    except Exception:
        return COMPOSE(config_name, typed, return_hydra_config)  # which says what is wrong
    loader = GlobalHydra.instance().config_loader()
    values = [x for x in parsed if is_value(x)]
    groups = [str(x.input_line) for x in parsed if not is_value(x)]
    if any("searchpath" in x for x in groups):  # files that may change
        return COMPOSE(config_name, typed, return_hydra_config)
    place = tuple(x.path for x in loader.get_search_path().get_path())
    key = (place, config_name, tuple(groups), return_hydra_config)
    if key not in composed:
        composed[key] = COMPOSE(config_name, groups, return_hydra_config)
    cfg = copy.deepcopy(composed[key])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    if return_hydra_config:
        with open_dict(cfg):
            cfg.hydra.overrides.task = [x for x in typed if not x.startswith("hydra")]
    return cfg


hydra.compose = compose

"""What a composed config may say, checked before anything is made of it and before torch is
imported: Hydra's part as soon as it is composed (`Loader`), ours when it is completed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from specomp.errors import UserError, first_line
from specomp.experiment.environment import forget_empty
from specomp.settings import choices
from specomp.targets import ALLOW, checked, targets, within

# What Hydra itself calls by these keys: a launcher, a sweeper, and Optuna's own sampler in one.
PLUGINS = {"hydra.launcher": "hydra_plugins", "hydra.sweeper": "hydra_plugins"}
PLUGINS |= {"hydra.sweeper.sampler": "optuna.samplers"}
EXTRAS = ("joblib", "submitit", "ray", "optuna")  # that bring launchers and sweepers
CORE = "hydra._internal.core_plugins"
LOGGERS = ("logging", "colorlog")  # modules whose classes Hydra's logging configuration may name
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Variables that a config may set for its jobs; others decide what programs run.
VARIABLES = ("CUDA_", "HF_", "MKL_", "NCCL_", "OMP_")
PLACES = ("path", "repo", "revision")  # keys that say where something is
# where settings are of classes of anybody's, or of Lightning: these say themselves what may be
OPEN = ("method", "benchmark", "quantizer", "trainer", "tracking")
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|^[.-]|^\s*$")
LONGEST = 100  # characters of a name: folders are called by two of them and a key
SEEDS = 2**32  # numpy takes no larger ones


class Loader(ConfigLoaderImpl):
    """Hydra's, whose every config is checked before Hydra calls what it names."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Raises UserError."""
        forget_empty()
        composed = super().load_configuration(
            config_name, overrides, run_mode, from_shell, validate_sweep_overrides
        )
        check_hydra(composed.hydra)
        if from_shell:  # what is only composed needs no launcher
            for part in ("launcher", "sweeper"):
                _check_installed(f"hydra.{part}", str(composed.hydra[part]["_target_"]))
        if run_mode == RunMode.MULTIRUN:
            self._check_sweep(overrides, composed.hydra.sweeper.get("params") or {})
        return composed

    def _check_sweep(self, overrides: list[str], params: Mapping[str, Any]) -> None:
        """A glob that no choice fits, which Hydra would run as a sweep of no jobs."""
        parser = OverridesParser.create(config_loader=self)
        for x in parser.parse_overrides([*(f"{k}={v}" for k, v in params.items()), *overrides]):
            if x.is_discrete_sweep() and next(x.sweep_string_iterator(), None) is None:
                there = choices(str(x.key_or_group))
                told = f": there are {', '.join(there)}" if there else ""
                raise UserError(f"{x.input_line}: there is nothing to sweep{told}.")


hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]


def check_hydra(composed: DictConfig) -> None:
    """What Hydra would call, log with and set in the environment. Raises UserError."""
    found = plain(composed)
    for where, target in targets(found, "hydra"):
        known = PLUGINS.get(where)
        if known and isinstance(target, str) and (within(target, known) or within(target, CORE)):
            continue
        checked(target, where)
    for group in ("hydra_logging", "job_logging"):
        _check_logging(found.get(group), f"hydra.{group}")
    for name in (found.get("job") or {}).get("env_set") or {}:
        if not str(name).startswith(VARIABLES):
            raise UserError(
                f"hydra.job.env_set.{name}: a config sets no variable but {'*, '.join(VARIABLES)}*:"
                " set it where the command is typed."
            )
    _check_allowance(found, "hydra")


def check_config(composed: DictConfig) -> None:
    """What our classes would be called with. Raises UserError."""
    found = plain(composed, strict=True)
    for where, target in targets(found, ""):
        checked(target, where)
    _check_allowance(found, "")
    for key, value in leaves(found, ""):
        _check_value(key, value)
    for group in ("model", "method"):
        name = (found.get(group) or {}).get("name")
        if isinstance(name, str) and name != "???":
            _check_name(f"{group}.name", name)
    paths = found.get("paths") or {}
    for key in ("cache", "outputs"):
        if paths.get(key) is None:
            raise UserError(f"paths.{key}=null: it has to be somewhere, paths.{key}=FOLDER.")
        try:
            Path(str(paths[key])).expanduser()
        except RuntimeError as error:
            raise UserError(
                f"paths.{key}={paths[key]}: there is no such home folder: paths.{key}=FOLDER."
            ) from error


def plain(node: Any, *, strict: bool = False) -> Any:
    """A config as mappings and lists, references followed where they can be; what cannot, as it is
    written. Raises UserError for a text that would become code only later, and if strict for any
    reference to what is not there.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        keys = _keys(node)
        found = [plain(_value(node, key, strict), strict=strict) for key in keys]
        return (
            dict(zip(map(str, keys), found, strict=True)) if isinstance(node, DictConfig) else found
        )
    return node


def _keys(node: DictConfig | ListConfig) -> list[Any]:
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return []
    return list(node) if isinstance(node, DictConfig) else list(range(len(node)))


def _value(node: Any, key: Any, strict: bool) -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    try:
        return node[key]
    except OmegaConfBaseException as error:
        raw, where = str(node._get_node(key)._value()), node._get_full_key(key)
        if strict and not isinstance(error, InterpolationToMissingValueError):
            raise UserError(f"{where}={raw}: {first_line(error)}.") from error
        if raw.startswith(("${oc.create", "${oc.decode")):  # text that may be a mapping
            raise UserError(f"{where}={raw} cannot be read before it is run.") from error
        return raw


def leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is neither a mapping nor a list."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{where}[{index}]")
    else:
        yield where, node


def _check_value(key: str, value: Any) -> None:
    """Numbers that no setting can have, and places that are none."""
    name = key.rpartition(".")[2]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: not a finite number.")
        if name == "seed" and not 0 <= value < SEEDS:
            raise UserError(f"{key}={value}: a seed is a whole number from 0 to {SEEDS - 1}.")
        if abs(value) >= 2**63:
            raise UserError(f"{key}={value}: too large, 64 bits do not hold it.")
        if value < 0 and not any(within(key, x) for x in OPEN):
            raise UserError(f"{key}={value}: no setting of specomp is negative.")
    if name == "path" and value is None:
        raise UserError(f"{key}=null: it has no default, give it a value, {key}=VALUE.")
    if (name in PLACES or within(key, "paths")) and value == "":
        raise UserError(f"{key} is empty: give it a value, {key}=VALUE.")


def _check_name(key: str, name: str) -> None:
    """Names are parts of the names of folders."""
    if UNSAFE.search(name) or len(name) > LONGEST:
        shown = name if len(name) <= LONGEST else f"{name[:20]}..."
        raise UserError(
            f"{key}={shown!r}: folders are called by it, so it is 1 to {LONGEST} characters without"
            " slashes or line breaks, and begins with neither a dot nor a dash."
        )


def _check_allowance(node: Any, where: str) -> None:
    """No config says what a config may call, not even to the workers of a launcher."""
    for key, _ in leaves(node, where):
        if ALLOW in key.split("."):
            raise UserError(f"{key}: a config does not set {ALLOW}; the environment does.")


def _check_installed(where: str, target: str) -> None:
    """A launcher or sweeper of an extra."""
    if within(target, "hydra_plugins") and target not in Plugins.instance().class_name_to_class:
        raise UserError(f"{where}._target_={target} is not installed.{extra_of(target)}")


def extra_of(text: str) -> str:
    """How a line about a launcher or a sweeper ends that an extra of ours brings."""
    if "hydra" not in text or (found := next((x for x in EXTRAS if x in text), None)) is None:
        return ""
    return f" It comes with pip install 'specomp[{found}]'."


def _check_logging(node: Any, where: str) -> None:
    """logging.config calls what `class` and `()` name and imports what begins with ext://."""
    for key, value in leaves(node, where):
        name = key.rpartition(".")[2]
        if name in ("class", "()"):
            module, _, attribute = str(value).rpartition(".")
            if not (module in (*LOGGERS, "logging.handlers") and attribute[:1].isupper()):
                checked(value, key)
        elif isinstance(value, str) and value.startswith("ext://") and value not in STREAMS:
            raise UserError(f"{key}={value}: logs go to {' or '.join(STREAMS)}, or to a file.")

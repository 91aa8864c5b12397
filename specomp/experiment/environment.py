"""Values that a config takes from the environment, ${oc.env:NAME}: secrets among them are in no
record, log or table.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

# Where things are, as conf/config.yaml takes it from the environment: no secrets.
PLACES = ("SPECOMP_CACHE", "SPECOMP_OUTPUTS", "SPECOMP_DATA")
NAMES = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")
SHORTEST = 4  # characters that may be a secret; hiding fewer would only hide ordinary text
_seen: dict[str, str] = {}  # value -> what stands for it


def forget_empty() -> None:
    """A variable that is set to nothing is not set."""
    for name in PLACES:
        if os.environ.get(name, "?").strip() == "":
            del os.environ[name]


def plain_config(cfg: DictConfig) -> Any:
    """A config with its references followed, but no values of the environment other than PLACES:
    what records keep, and what points of tables are made of.
    """
    with _unread():
        return OmegaConf.to_container(cfg, resolve=True)


@contextmanager
def _unread() -> Iterator[None]:
    def stand_in(name: str, *default: Any) -> Any:
        return oc.env(name, *default) if name in PLACES else _stands_for(name)

    OmegaConf.register_new_resolver("oc.env", stand_in, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _stands_for(name: str) -> str:
    return f"${{oc.env:{name}}}"


def remember(cfg: DictConfig) -> None:
    """From here on `hidden` knows what the config takes from the environment."""
    for name in set(NAMES.findall(OmegaConf.to_yaml(cfg, resolve=False))) - set(PLACES):
        if len(value := os.environ.get(name, "")) >= SHORTEST:
            _seen[value] = _stands_for(name)


def hidden(text: str) -> str:
    """Text without those values."""
    for value in sorted(_seen, key=len, reverse=True):
        text = text.replace(value, _seen[value])
    return text


def hide_in_logs() -> None:
    """Every message of this process, whoever logs it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "hides", False):
        return

    def hiding(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        if _seen:
            with suppress(TypeError, ValueError):  # an ill-formed message, which logging tells of
                record.msg, record.args = hidden(record.getMessage()), ()
        return record

    hiding.hides = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(hiding)

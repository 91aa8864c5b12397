"""Objects of a composed config; what is wrong with one is told in one line that names the key.
Imports no torch: what needs none is refused before it is imported.
"""

import inspect
import re
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from specomp.errors import UserError, first_line, one_line


def make(cfg: DictConfig, group: str, **more: Any) -> Any:
    """Instantiate one group, with more nodes in it, turning what is wrong with it into one line
    that names the key.
    """
    try:
        node = cfg[group]
        if more:
            node = node.copy()
            with open_dict(node):
                node.update(more)
        made = instantiate(node)
        # a misspelt keyword would otherwise show when it is called, with the model loaded
        if isinstance(made, partial):
            inspect.signature(made.func).bind_partial(**made.keywords)
        return made
    except TypeError as error:
        raise UserError(f"{group}: {error}.") from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        where = re.search(r"full_key: (\S+)", str(error))
        prefix = where.group(1) if where else group
        if isinstance(cause, ValidationError):
            problems = [
                f"{'.'.join([prefix, *map(str, x['loc'])])}={_typed(x['input'])}: {x['msg']}"
                for x in cause.errors()
            ]
            raise UserError("; ".join(problems) + ".") from error
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{prefix}: {one_line(cause)}") from error
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no default: give it a value, {error.full_key}=VALUE."
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or group}: {first_line(error)}") from error


def _typed(value: Any) -> str:
    """A refused value as it would be typed; objects by their class."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, (str, int, float)) else f"<{type(value).__name__}>"

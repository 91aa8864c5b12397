"""What users get wrong, found before hours are spent and told in one line that names the key."""

import errno
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from specomp.errors import UserError
from specomp.evaluation.suite import Suite
from specomp.methods.base import Method, Quantizer, Upstream
from specomp.methods.block_refine import BlockRefine
from specomp.methods.lora import LoRA
from specomp.methods.spectrum import SpectrumTraining
from specomp.methods.svd import Factors, FullRank
from specomp.models.family import LinearSpec
from specomp.models.files import first_line, one_line
from specomp.models.load import torch_device
from specomp.models.sources import Source
from specomp.options import Options
from specomp.phases import Distillation
from specomp.ratio import Cost, pair_cost, retained
from specomp.statistics import GRADIENT_SCOPES, Statistic

log = logging.getLogger(__name__)


def make(cfg: DictConfig, group: str) -> Any:
    """Instantiate one group, turning what is wrong with it into one line that names the key."""
    try:
        made = instantiate(cfg[group])
        if isinstance(made, partial):  # a misspelt keyword would otherwise show when it is called, with the model loaded
            inspect.signature(made.func).bind_partial(**made.keywords)
        return made
    except TypeError as error:
        raise UserError(f"{group}: {error}.") from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        where = re.search(r"full_key: (\S+)", str(error))
        prefix = where.group(1) if where else group
        if isinstance(cause, ValidationError):
            problems = [f"{'.'.join([prefix, *map(str, x['loc'])])}={_typed(x['input'])}: {x['msg']}" for x in cause.errors()]
            raise UserError("; ".join(problems) + ".") from error
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{prefix}: {one_line(cause)}") from error
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no default: give it a value, {error.full_key}=VALUE.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or group}: {first_line(error)}") from error


def _typed(value: Any) -> str:
    """A refused value as it would be typed; objects by their class."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, (str, int, float)) else f"<{type(value).__name__}>"


def check_machine(source: Source, trainer: Callable[..., L.Trainer]) -> int:
    """Device and loop, before the model is loaded; returns the number of processes that train. Raises UserError."""
    torch_device(source.device, source.device_map)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an accelerator is left idle is meant, see conf/trainer
            return trainer().world_size
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def check_training(method: Method, upstream: Upstream, num_samples: int, processes: int) -> None:
    """A method that trains: its other slots, data and processes. Raises UserError."""
    training = method.training
    if not isinstance(training, (SpectrumTraining, LoRA)):
        raise UserError(f"method.training is a {type(training).__name__}; specomp trains a SpectrumTraining or a LoRA (specomp/methods).")
    if training.trains == "spectrum" and method.repairs and isinstance(method.allocation, FullRank):
        raise UserError(
            f"Every component is kept until the training drops some, so {type(method.compensation).__name__} has nothing to repair: "
            "use method/compensation=none, or an allocation that truncates, such as method/allocation=global_loss."
        )
    if training.trains == "spectrum" and upstream == "compressed":
        raise UserError(
            "A training of the spectrum starts from components of the dense model, before anything is compressed: "
            "use calibration.upstream=dense."
        )
    training.check(training.samples_of(num_samples), processes)


def check_precision(source: Source, method: Method) -> None:
    """Raises UserError where autocast could not train a model of this dtype: it mixes bfloat16 with float32 only."""
    if isinstance(method.training, Distillation) and method.training.precision == "bfloat16" and source.dtype == "float16":
        raise UserError(
            f"{type(method.training).__name__} in bfloat16 cannot train a float16 model: "
            "set model.dtype=bfloat16, or method.training.precision=float32."
        )


def check_streamed(source: Source, method: Method, needs: Iterable[Statistic], options: Options, suite: Suite) -> None:
    """What a model that is never in memory as a whole cannot do. Raises UserError."""
    if not source.stream:
        return
    reason = source.unstreamable()
    if reason is None and method.training.trains != "nothing":
        reason = f"method={method.name} trains, which needs the whole model in memory: set model.stream=false"
    if reason is None and (gradients := [x.name for x in needs if x.scope in GRADIENT_SCOPES]):
        reason = f"{gradients[0]} is a statistic of gradients, which need the whole model in memory: set model.stream=false"
    if reason is None and not method.is_dense and not options.save:
        reason = "the compressed model exists on disk only: set save=true"
    timings = [x.id for x in suite.benchmarks if getattr(x, "volatile", False)]
    if reason is None and timings:
        reason = f"{timings[0]} would measure the disk: set model.stream=false, or choose another benchmark"
    if reason is not None:
        raise UserError(f"model.stream=true: {reason}.")


def check_quantizer(method: Method, quantizer: Quantizer, options: Options) -> None:
    """Whether quantized factors can be stored, before any work. Raises UserError."""
    if quantizer.bits >= 16:
        return
    if method.is_dense:
        log.warning("method=dense has no factors: quantizer is not used.")
    elif method.training.trains == "stored" or (isinstance(method.compensation, BlockRefine) and method.training.trains == "nothing"):
        slot = "training" if method.training.trains == "stored" else "compensation"
        raise UserError(
            f"{type(getattr(method, slot)).__name__} moves numbers off the grid they were rounded to: use another method/{slot}, "
            "or quantizer=none."
        )
    elif not isinstance(method.packing, Factors):
        raise UserError("A quantizer rounds U and Vt, which only method/packing=factors stores: choose that packing, or quantizer=none.")
    elif options.save and options.export == "factors" and find_spec("compressed_tensors") is None:
        raise UserError(
            f"Saving factors of {quantizer.bits} bits needs compressed-tensors: pip install 'specomp[int4]', or set save=false, which "
            "evaluates all the same."
        )


def check_budget(linears: Sequence[LinearSpec], retention: float, cost: Cost = pair_cost) -> None:
    """Before calibration: no allocation helps when the budget cannot pay rank 1 everywhere. Raises UserError."""
    kept, least = retention * sum(x.params for x in linears), sum(min(cost(x.m, x.n, 1), x.params) for x in linears)
    if kept < least:
        raise UserError(
            f"ratio.compression={retained(retention):.6g} keeps {kept:.0f} parameters of the {len(linears)} linears, "
            f"rank 1 in each takes {least}: lower ratio.compression."
        )


def actionable(error: BaseException) -> UserError | None:
    """What to do about an exhausted resource, or None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("No space left on the device: free some, or point paths.cache or paths.outputs elsewhere.")
    # torch tells of exhausted CPU memory by the text alone
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return UserError(
            f"Out of memory ({one_line(error, 120)}): lower calibration.batch_size or benchmark.batch_size, set calibration.window, "
            "use model.dtype=bfloat16, or model.stream=true."
        )
    return None

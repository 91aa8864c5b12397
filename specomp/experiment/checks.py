"""What users get wrong, found before hours are spent and told in one line that names the key."""

import errno
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from specomp.compression.route import Route
from specomp.errors import UserError, needed, one_line
from specomp.evaluation.suite import Suite
from specomp.experiment.options import Options
from specomp.forms.prices import Budget
from specomp.models.gguf_export import TYPES, check_gguf
from specomp.models.identity import check_biases
from specomp.models.load import torch_device
from specomp.models.sources import Source
from specomp.numerics.statistics import GRADIENT_SCOPES
from specomp.slots import Method

log = logging.getLogger(__name__)


def check_machine(source: Source, trainer: Callable[..., L.Trainer]) -> int:
    """Device and loop, before the model is loaded; returns the number of processes that train.
    Raises UserError.
    """
    torch_device(source.device, source.device_map)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # that an accelerator is left idle is meant, see conf/trainer
            warnings.simplefilter("ignore")
            return trainer().world_size
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def check_streamed(
    source: Source, method: Method, budget: Budget, route: Route, options: Options, suite: Suite
) -> None:
    """What a model that is never in memory as a whole cannot do. Raises UserError."""
    if not source.stream:
        return
    reason = source.unstreamable()
    if reason is None and method.training.active:
        reason = (
            f"method={method.name} trains, which needs the whole model in memory: set"
            " model.stream=false"
        )
    if reason is None and budget.tries > 1 and method.spends:
        reason = f"{budget.setting} is met by a search, which needs the dense model in memory"
    if reason is None and (gradients := sorted(x.name for x in route.gradients)):
        reason = (
            f"{gradients[0]} is a statistic of gradients, which need the whole model in memory: set"
            " model.stream=false"
        )
        needs = method.whitening.needs | method.target.needs | method.allocation.needs
        if not any(x.scope in GRADIENT_SCOPES for x in needs):
            key = "quantizer.rule" if method.chooses_grids else "quantizer"
            reason += f", or {key}.output_damping=null, which alone asks for it"
    if reason is None and not method.is_dense and not options.save:
        reason = "the compressed model exists on disk only: set save=true"
    if reason is None and options.save and options.export in TYPES:
        reason = (
            f"export={options.export} writes models that are in memory as a whole: use export=dense"
        )
    timings = [x.id for x in suite.benchmarks if x.volatile]
    if reason is None and timings:
        reason = (
            f"{timings[0]} would measure the disk: set model.stream=false, or choose another"
            " benchmark"
        )
    if reason is not None:
        raise UserError(f"model.stream=true: {reason}.")


def check_packed(method: Method, options: Options) -> None:
    """Whether rounded numbers can be stored, before any work. Raises UserError."""
    grids = method.rounding.grids
    if not grids:
        return
    if method.is_dense:
        log.warning("Nothing is compressed: quantizer is not used.")
    elif options.save and options.export == "factors" and any(x.simulated for x in grids):
        said = " or ".join(map(str, sorted({x.bits for x in grids})))
        otherwise = ", or set save=false, which evaluates all the same"
        needed("compressed_tensors", "int4", f"Saving numbers of {said} bits", otherwise)


def check_export(config: Any, method: Method, options: Options) -> None:
    """Whether a plain folder can hold what the method makes, before any work. Raises UserError."""
    if options.save:
        method.units.check_export(options.export, method.training)
        if options.export in TYPES and not method.is_dense:
            check_gguf(config)
    if options.save and options.export != "factors" and method.training.adds_bias:
        check_biases(config)


def actionable(error: BaseException) -> UserError | None:
    """What to do about an exhausted resource, or None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            "No space left on the device: free some, or point paths.cache or paths.outputs"
            " elsewhere."
        )
    # torch tells of exhausted CPU memory by the text alone
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    ):
        return UserError(
            f"Out of memory ({one_line(error, 120)}): lower calibration.batch_size or"
            " benchmark.batch_size, set calibration.layers_at_once, use model.dtype=bfloat16, or"
            " model.stream=true."
        )
    return None

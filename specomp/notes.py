"""What a reader of a record should know about how its linears came out: damping, growth, a solver that was not exact, rounding."""

from collections.abc import Sequence

import torch

from specomp.methods.base import Method, Quantizer
from specomp.methods.block_refine import BlockRefine
from specomp.results.record import Record
from specomp.stages.compress import LinearReport


def note_factors(record: Record, reports: Sequence[LinearReport], method: Method, quantizer: Quantizer, dtype: torch.dtype) -> None:
    """dtype: the model's."""
    gated = method.training.trains == "spectrum"  # reports are of what is stored at the end, not of what closed forms left
    damped = [x for x in reports if x.damping > 0]
    if damped:
        record.note(
            f"{len(damped)} of {len(reports)} linears have a damped Gram matrix, "
            f"at most {max(x.damping for x in damped):.1e} of their mean diagonal"
        )
    if isinstance(method.compensation, BlockRefine) and not gated:
        record.note("errors of single linears are those before the block refinement; compensation_gain is of a decoder layer's outputs")
    if method.training.trains == "stored":
        record.note("errors of single linears, and growth of pivots, are those before the recovery")
    pivoted = [x.growth for x in reports if x.growth is not None]
    if pivoted:
        record.note(f"{len(pivoted)} of {len(reports)} linears are pivoted, with coefficients up to {max(pivoted):.2f}")
    worst = max(reports, key=lambda x: x.loss_over_bound)
    exact = not gated and not method.compensation.needs
    if exact and quantizer.bits >= 16 and dtype == torch.float32 and worst.loss_over_bound > 1.01:
        record.note(f"{worst.name} loses {worst.loss_over_bound:.3f} times its Eckart-Young bound: try method.whitening.solve=float64")


def note_quantization(record: Record, reports: Sequence[LinearReport], dtype: torch.dtype) -> None:
    """Which weights are integers, and where the Hessians were damped by more than was asked; nothing without quantization."""
    rounded = [x for x in reports if x.quantization_error is not None]
    if not rounded:
        return
    quantizer, held_in = record.identity["quantizer"], str(dtype).removeprefix("torch.")
    record.note(
        f"the factors of {len(rounded)} linears have {quantizer['bits']} bits: metrics are of the rounded numbers held in {held_in} "
        "(simulated), model_bytes is what a folder of factors stores"
    )
    if len(rounded) < len(reports):
        record.note(f"{len(reports) - len(rounded)} linears stay dense and are not quantized")
    asked = quantizer.get("damping", 0.0)
    more = [x.quantization_damping for x in rounded if x.quantization_damping > asked]
    if more:
        record.note(f"GPTQ of {len(more)} linears needed more damping than {asked:g}, at most {max(more):.1e} of their mean diagonal")

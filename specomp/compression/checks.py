"""What cannot work, found before any number is seen, whoever asks: the library and an experiment
alike.
"""

from typing import Any

from specomp.compression.route import Route
from specomp.errors import UserError
from specomp.forms.options import DENSE
from specomp.forms.prices import Budget
from specomp.models.family import ModelFamily
from specomp.slots import Method, Upstream, check_slots


def check_method(
    method: Method, budget: Budget, upstream: Upstream, num_samples: int, processes: int, dtype: str
) -> Route:
    """Whether the slots fit each other, the budget, the samples, the processes and the model's
    dtype ("float32"). Raises UserError.
    """
    check_slots(method)
    route = Route.of(method, upstream, num_samples)
    training, refinement = method.training, method.refinement
    moves = (
        "training"
        if training.moves_stored
        else "refinement"
        if refinement.moves_stored and not training.chooses
        else None
    )
    if method.rounding.grids and moves is not None:
        raise UserError(
            f"{type(getattr(method, moves)).__name__} moves numbers off the grid they were rounded"
            f" to: use another method/{moves}, or quantizer=none."
        )
    _check_packing(method)
    _check_search(method, budget)
    method.units.check(method)
    if training.active:
        training.check(method, budget, training.samples_of(num_samples), processes, dtype)
    _check_grids(method, budget)
    return route


def _check_search(method: Method, budget: Budget) -> None:
    """Whether a model can be stored again and again."""
    if budget.tries == 1 or method.is_dense:
        return
    if not method.spends:
        raise UserError(
            f"{budget.setting} is met by a search, and {method.name} spends no budget: use another"
            " method, such as specomp, or another ratio."
        )
    if method.training.active:
        raise UserError(
            f"{budget.setting} is met by a search, which would train {budget.tries} times: use a"
            " method that does not train, such as specomp, or a budget of bits, ratio=bits3."
        )
    if method.refinement.active:
        raise UserError(
            f"{budget.setting} is met by a search, and {type(method.refinement).__name__} changes"
            " what every try starts from: use method/refinement=none, or the bits that a search"
            " without it ends with."
        )


def _check_packing(method: Method) -> None:
    """Whether what works on components of a spectrum finds any in what is stored."""
    packing, size_of = type(method.packing).__name__, method.packing.size_of
    if size_of == "weights" and method.training.moves_stored:
        raise UserError(
            f"{type(method.training).__name__} adds to products, and {packing} makes its product of"
            " the whole weight: use method/training=none, or another method/packing."
        )
    for slot, active in (
        ("training", method.training.chooses),
        ("compensation", method.compensation.active and not method.chooses_grids),
    ):
        if active and size_of != "rank":
            raise UserError(
                f"{type(getattr(method, slot)).__name__} works on components of a spectrum, and"
                f" {packing} stores none: use method/{slot}=none, or another method/packing."
            )


def _check_grids(method: Method, budget: Budget) -> None:
    """Whether what is stored has columns that can be scaled, the budget can count what the grids
    change, and losses on them compare.
    """
    if method.packing.size_of == "weights" and any(x.scaled for x in method.rounding.grids):
        raise UserError(
            f"This quantizer scales columns (AWQ), and what {type(method.packing).__name__} stores"
            " has none: use gptq_int4, rtn_int4 or nf4."
        )
    if (
        method.packing.size_of == "weights"
        and not method.chooses_grids
        and any(x.scope == "output" for x in method.rounding.needs)
    ):
        raise UserError(
            "This quantizer lets rows make up for each other (quantizer.output_damping), and what"
            f" {type(method.packing).__name__} stores of them is not in columns: set"
            " quantizer.output_damping=null, or use gptq_int4."
        )
    if not method.spends:
        return
    packing = type(method.packing).__name__
    if method.chooses_grids and not budget.counts_bits:
        raise UserError(
            f"{budget.setting} counts parameters, which are as many on every grid: use ratio=bits3"
            " for a choice among grids, or a quantizer of one, such as gptq_int4."
        )
    if method.packing.size_of == "whole" and not budget.counts_bits:
        raise UserError(
            f"{packing} keeps every linear in full, and {budget.setting} counts parameters: use"
            " another method/packing, or ratio=bits3."
        )
    if method.packing.size_of == "whole" and not method.rounding.grids:
        raise UserError(
            f"{packing} keeps every linear in full, which saves nothing without a grid: use another"
            " method/packing, or quantizer=grids."
        )
    if method.chooses_grids and method.units.active and not method.comparable:
        raise UserError(
            "What rounding loses in the linears of one MLP compares only where the norm knows their"
            " gradients: use method/whitening=kronecker, or method/units=none."
        )


def check_budget(model: Any, family: ModelFamily, method: Method, budget: Budget) -> None:
    """Whether the method's units fit the model, and the budget pays the smallest form everywhere:
    else no allocation helps. model: of transformers, without numbers too. Raises UserError.
    """
    units, dtype = family.units(model), model.dtype
    if not method.spends:
        return
    method.units.check_family(family, model.config)
    method.units.forms(family.functional_units(model))  # which may refuse them
    forms, grid, least, whole = method.rounding.single(method.packing), method.rounding.grid, 0, 0
    for unit in units:
        dense = budget.price(DENSE.parts(unit, 0), dtype)
        smallest = [
            budget.price(form.parts(unit, sizes[0], grid), dtype)
            for form in forms
            if len(sizes := form.sizes(unit))
        ]
        least, whole = least + min(smallest + [dense]), whole + dense
    allowed = budget.share(dtype) * whole
    if allowed < least and budget.tries == 1:
        small = "rank 1" if any(x.size_of == "rank" for x in forms) else "the smallest form"
        raise UserError(
            f"{budget.setting} keeps {allowed:.0f} {budget.currency} of the {len(units)} linears,"
            f" {small} in each takes {least}: {budget.remedy}."
        )

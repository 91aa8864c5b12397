"""What records and tables are found by, kept through every renaming: new names to those that keys
and points were made with.

A key is a hash of classes and settings (`method_identity`), a point one of a composed config
(`portable`). Whoever moves a class or adds a setting says here what it was before; tests hold every
committed record to it.
"""

from collections.abc import Mapping
from typing import Any

from specomp.slots import Method, describe

OLD_TARGETS = {
    "specomp.slots.Method": "specomp.methods.base.Method",
    "specomp.forms.factors.Factors": "specomp.methods.svd.Factors",
    "specomp.forms.pivoted.Pivoted": "specomp.methods.pivoted.Pivoted",
    "specomp.forms.prices.Numbers": "specomp.ratio.Ratio",
    "specomp.training.phases.Convergence": "specomp.phases.Convergence",
}
# Rows whose name is another's now: in a point the name is what it was.
OLD_ROWS = {"specomp_low_rank": "specomp"}
# Settings that came later, by class, with the value that they have in every key made before: left
# out of a key at that value.
LATER: dict[str, dict[str, Any]] = {
    name: {"bos": "auto"} for name in ("TextCalibration", "MixedCalibration", "TokenFile")
}
LATER["Cut"] = {"order": "weighted", "repair": True, "loss_scale": 1.0}
LATER["FactorQuantizer"] = {"search": 0, "scaling": 0, "output_damping": None}
LATER["PackagedGGUF"] = {"off_grid": False}
LATER["KroneckerWhitening"] = {"input_damping": 0.0}
LATER["FunctionalUnits"] = {"value_output": None, "query_key": None}
# What of a config says which weights are wanted; what inside it only says where they are made, or
# repeats what the weights say of themselves (shape); what of a calibration only says how fast.
WEIGHTS = ("model", "method", "ratio", "calibration", "quantizer", "seed")
MACHINE = {"device", "device_map", "stream", "data_root", "local", "partial", "shape"}
MEMORY = {"batch_size", "layers_at_once", "window"}  # the last is what the second was called


def method_identity(method: Method) -> dict[str, Any]:
    """What a record's key says of a method: its name is none of it, the rounding stands
    beside it.
    """
    found = without_later(describe(method))
    found |= {"name": None}
    found.pop("rounding")
    if not method.units.active:  # a slot that came later
        found.pop("units")
    refinement = found.pop("refinement")
    if method.refinement.active:  # it was a compensation once
        found["refinement" if method.compensation.active else "compensation"] = refinement
    return found


def without_later(described: Any) -> Any:
    """A description without the settings of LATER that are at their first value."""
    if isinstance(described, Mapping):
        later = LATER.get(str(described.get("class")), {})
        return {
            k: without_later(v) for k, v in described.items() if k not in later or v != later[k]
        }
    return [without_later(v) for v in described] if isinstance(described, list) else described


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a point is made of: the part of a config that says which weights are wanted, the same on
    every machine.
    """
    wanted = {name: _portable(config.get(name)) for name in WEIGHTS}
    if wanted["seed"]:  # before it did, records of any seed had the samples of seed 0
        wanted["seed"] = {"of everything, samples too": wanted["seed"]}
    if isinstance(wanted["calibration"], Mapping):
        wanted["calibration"] = {k: v for k, v in wanted["calibration"].items() if k not in MEMORY}
    method = wanted["method"]
    if isinstance(method, Mapping):
        method["name"] = OLD_ROWS.get(method.get("name", ""), method.get("name"))  # type: ignore[index]
        if str((method.get("packing") or {}).get("_target_")).endswith(".Whole") and str(
            (wanted["quantizer"] or {}).get("_target_")
        ).endswith(".NoQuantizer"):  # the dense row had another packing, which nothing looked at
            method["packing"] = {"_target_": "specomp.forms.factors.Factors"}  # type: ignore[index]
        units = method.get("units") or {}
        if str(units.get("_target_")).endswith(".NoUnits"):  # a slot that came later
            method.pop("units")  # type: ignore[attr-defined]
    if isinstance(method, Mapping) and "refinement" in method:
        refinement, compensation = method.pop("refinement"), method.get("compensation")  # type: ignore[attr-defined]
        if not str(refinement["_target_"]).endswith(".NoRefinement"):
            alone = str((compensation or {}).get("_target_")).endswith(".NoCompensation")
            method["compensation" if alone else "refinement"] = refinement  # type: ignore[index]
    return wanted


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        later = LATER.get(str(value.get("_target_")).rpartition(".")[2], {})
        kept = {
            k: _portable(v)
            for k, v in value.items()
            if k not in MACHINE and (k not in later or v != later[k])
        }
        return kept | (
            {"_target_": OLD_TARGETS.get(kept["_target_"], kept["_target_"])}
            if "_target_" in kept
            else {}
        )
    return [_portable(v) for v in value] if isinstance(value, (list, tuple)) else value

"""Makes transformers know the compressed model types, at no cost to programs that never import
transformers.

Three steps, each only when the one before needs it: `import specomp` watches for the import of
AutoConfig; AutoConfig gets a stand-in per compressed model type; the first folder that is loaded
makes the real classes. (The real classes cannot be made any earlier: they need the model code,
which cannot be imported while transformers' Auto modules, which import each other, are half-made.)
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Give AutoConfig, AutoModelForCausalLM and AutoModel the classes of every supported compressed
    model type. Idempotent; imports torch.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
        AutoModel,
        AutoModelForCausalLM,
    )

    from specomp.models.families import FAMILY_OF_TYPE
    from specomp.models.family import COMPRESSED_PREFIX
    from specomp.models.remote import compressed_config, compressed_model

    for base in FAMILY_OF_TYPE:
        name = COMPRESSED_PREFIX + base
        if name in CONFIG_MAPPING and not issubclass(CONFIG_MAPPING[name], _StandIn):
            continue
        config_class = compressed_config(CONFIG_MAPPING[base], name)
        for auto, names in (
            (AutoModel, MODEL_MAPPING_NAMES),
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ):
            stock = getattr(transformers, str(names[base]))
            model_class = compressed_model(stock, config_class, modules_of, Kinds())
            auto.register(config_class, model_class)
            if auto is AutoModelForCausalLM:
                _save_with_code(model_class)
            else:
                model_class.save_pretrained = _headless
            _find_when_unpickled(model_class, config_class)
        CONFIG_MAPPING.register(name, config_class)


def adopt(model: Any) -> None:
    """Make a stock model of which linears were replaced one of the compressed class, so that its
    own `save_pretrained` writes a folder that can be read.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from specomp.models.family import COMPRESSED_PREFIX, base_model_type

    register()
    base, classes = base_model_type(model.config), dict[Any, Any](MODEL_FOR_CAUSAL_LM_MAPPING)
    if type(model) is classes[CONFIG_MAPPING[base]]:
        model.__class__ = classes[CONFIG_MAPPING[COMPRESSED_PREFIX + base]]


def _headless(self: Any, *args: Any, **options: Any) -> None:
    """Refused: a folder without the head cannot be read, and it may be the one it came from."""
    from specomp.errors import UserError

    raise UserError(
        f"{type(self).__name__} has no head: save the model that AutoModelForCausalLM opens."
    )


def _save_with_code(model_class: Any) -> None:
    """Saved again it writes the code that goes with the weights, and what engines refuse they still
    do.
    """

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **options: Any) -> None:
        folder = Path(save_directory)
        before = {path: path.stat() for path in folder.glob("model*.safetensors*")}
        super(model_class, self).save_pretrained(save_directory, *args, **options)
        from specomp.checksums import LIST
        from specomp.disk import remove
        from specomp.models.identity import hide_from_engines, write_identity

        if (folder / "config.json").is_file():  # of several processes one writes
            write_identity(folder, self, "factors")
            before_too = getattr(self.config, "auto_map", None) or {"AutoModel": ""}
            if "AutoModel" not in before_too or any(
                getattr(x, "unserved", "") for x in self.modules()
            ):
                hide_from_engines(folder)
        # of another model in this place, in another number of files: two sets would be refused
        old = {x for x, stat in before.items() if x.exists() and x.stat() == stat}
        if set(folder.glob("model*.safetensors*")) - old:
            for path in (*old, folder / LIST):
                remove(path)

    save_pretrained.__doc__ = model_class.save_pretrained.__doc__
    model_class.save_pretrained = save_pretrained


def _find_when_unpickled(*kinds: Any) -> None:
    """Pickle asks for them here."""
    for kind in kinds:
        kind.__module__ = __name__
        _classes[kind.__name__] = kind


_classes: dict[str, type] = {}


def __getattr__(name: str) -> Any:
    """The classes of compressed models, as pickle asks for them."""
    if name.startswith("Specomp"):
        register()
        if name in _classes:
            return _classes[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")


class Kinds:
    """Classes of modules by their full names: those that are known here. Never imports what a
    folder names, but specomp's own.
    """

    def __getitem__(self, name: str) -> type:
        from torch import nn

        from specomp.errors import UserError
        from specomp.models.modules import Substitute, full_name

        module, _, _ = name.rpartition(".")
        if module.split(".")[0] == "specomp":
            importlib.import_module(module)
        known: dict[str, type] = {full_name(x): x for x in [nn.Linear, *_subclasses(Substitute)]}
        if name not in known:
            raise UserError(
                f"This folder holds modules of the class {name}, which is not known here: import"
                " what defines it first, or load it without specomp by trust_remote_code=True,"
                " which runs the copy in the folder."
            )
        return known[name]


def _subclasses(kind: type) -> list[type]:
    found: list[type] = list(kind.__subclasses__())
    return found + [y for x in found for y in _subclasses(x)]


def modules_of(config: Any, linear: Any) -> dict[str, list[Any]]:
    """What stands in the place of linears by a config, also by one that was written before
    `specomp_modules` was there.
    """
    found = dict(config.specomp_modules or {})
    pivoted = set(config.lowrank_pivoted or ())
    biased = set(config.lowrank_biases or ())
    ranks = config.lowrank_ranks or {}
    for name in dict.fromkeys([*ranks, *biased]):
        dense = linear(name)
        sizes = {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": name in biased or dense.bias is not None,
        }
        kind = "pivoted.PivotedLinear" if name in pivoted else "factors.LowRankLinear"
        low = [f"specomp.forms.{kind}", sizes | {"rank": ranks.get(name)}]
        found[name] = low if name in ranks else ["torch.nn.modules.linear.Linear", sizes]
    return found


def register_when_needed() -> None:
    """See the module docstring. Idempotent, milliseconds."""
    if AUTO_CONFIG in sys.modules:
        _register_stand_ins()
    elif not any(isinstance(finder, _WatchAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchAutoConfig())


class _StandIn:
    """What AutoConfig finds for a compressed model type before `register()`: registers, then acts
    as the real config class.
    """

    model_type: str

    def __new__(cls, **fields: Any) -> Any:
        return cls._real()(**fields)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        return cls._real().from_dict(config_dict, **options)

    @classmethod
    def _real(cls) -> Any:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        register()
        return CONFIG_MAPPING[cls.model_type]


def _register_stand_ins() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from specomp.models.families import FAMILY_OF_TYPE
    from specomp.models.family import COMPRESSED_PREFIX

    for name in (COMPRESSED_PREFIX + base for base in FAMILY_OF_TYPE):
        if name not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(name, type("StandIn", (_StandIn,), {"model_type": name}))


class _WatchAutoConfig(importlib.abc.MetaPathFinder):
    """Finds the module of AutoConfig, once, the way the other finders do, and puts the stand-ins
    into it after its code has run.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_stand_ins()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

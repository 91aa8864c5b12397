"""The classes of a compressed model, made from those of any causal LM of transformers.

The source of these functions and of the modules that a folder holds is copied into every export
(save.py::modelling_source), so that a compressed folder also loads where specomp is not installed:
they may use nothing but torch, transformers and each other.
"""

from typing import Any

# What a compressed folder's config.json has besides; the last three are of folders that were
# written before the first was there.
OWN_FIELDS = ("specomp_modules", "lowrank_ranks", "lowrank_biases", "lowrank_pivoted")


def compressed_config(base: Any, compressed_type: str) -> Any:
    """The config class of `base` with a model_type of its own, and by full name what stands in the
    place of its linears.
    """

    class CompressedConfig(base):  # type: ignore[misc]
        # unknown to a stock transformers: a clear error there, never random weights
        model_type = compressed_type
        specomp_modules: dict[str, list[Any]] | None = None  # [class, arguments] by full name
        lowrank_ranks: dict[str, int] | None = None
        lowrank_biases: list[str] | None = None
        lowrank_pivoted: list[str] | None = None

    CompressedConfig.__name__ = CompressedConfig.__qualname__ = f"Specomp{base.__name__}"
    return CompressedConfig


def shards_of(model: Any) -> dict[str, str]:
    """The tensor parallel plan of a compressed model: of each linear that the stock one shards,
    what of it is; empty where one cannot be.
    """
    kinds: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        kind = ".".join("*" if x.isdigit() else x for x in name.split("."))
        if style := (model._tp_plan or {}).get(kind):
            # an nn.Linear as a whole, whatever its sizes
            parts = module.shards(style) if hasattr(module, "shards") else {"": style}
            kinds.setdefault(kind, []).append((name, parts))
    found = [x for members in kinds.values() for x in members]
    if any(parts is None for _, parts in found):
        return {}
    if all(parts == members[0][1] for members in kinds.values() for _, parts in members):
        found = [(kind, members[0][1]) for kind, members in kinds.items()]
    # otherwise layer by layer, which vLLM reads and transformers does not
    split = [(name, *x) for name, parts in found for x in parts.items()]
    return {f"{name}.{part}".rstrip("."): style for name, part, style in split}


def tell_apart(model: Any, names: Any) -> None:
    """Where the modules that hold these linears differ in what stands in them, give each kind a
    class of its own: engines look at one module of a class and rewrite all alike (vLLM).
    """
    holders = [model.get_submodule(x) for x in {name.rpartition(".")[0] for name in names}]
    for stock in {type(x) for x in holders}:
        alike: dict[Any, list[Any]] = {}
        for module in model.modules():
            if type(module) is stock:
                alike.setdefault(tuple(type(x) for x in module.children()), []).append(module)

        def plain(self: Any, protocol: Any, stock: Any = stock) -> Any:
            return object.__new__, (stock,), self.__dict__  # pickled as the one that there is

        for members in list(alike.values())[1:]:
            own = {"__module__": stock.__module__, "__reduce_ex__": plain}
            made = type(stock.__name__, (stock,), own)
            for module in members:
                module.__class__ = made


def compressed_model(base: Any, compressed_config_class: Any, modules_of: Any, kinds: Any) -> Any:
    """The model class of `base`, with its head or without (engines have one of their own), with
    other modules in the place of some linears.

    modules_of: (config, linear by full name) -> [class, arguments] by full name; kinds: that class
    by its name.
    """

    class CompressedModel(base):  # type: ignore[misc]
        config_class = compressed_config_class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if self.base_model is self and getattr(config, "quantization_config", None):
                raise ValueError(
                    "The packed integers of this folder are those of the model with its head: open"
                    " it by AutoModelForCausalLM."
                )
            inner, prefix = self.base_model, f"{self.base_model_prefix}."

            def found(name: str) -> Any:
                return inner.get_submodule(name.removeprefix(prefix))

            entries = modules_of(config, found)
            for name, (kind, arguments) in entries.items():
                weight = found(name).weight
                # the meta device while weights are being loaded
                place = {
                    "dtype": weight.dtype,
                    "device": weight.device,
                }
                parent, _, leaf = name.rpartition(".")
                setattr(found(parent), leaf, kinds[kind](**arguments, **place))
            self._tp_plan = shards_of(self)
            if inner is self:  # what engines ask for
                tell_apart(self, [name.removeprefix(prefix) for name in entries])

    CompressedModel.__name__ = CompressedModel.__qualname__ = f"Specomp{base.__name__}"
    return CompressedModel

"""The classes of a compressed model, made from those of any causal LM of transformers.

The source of both functions and of the modules that a folder holds is copied into every export
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
            inner, prefix = self.base_model, f"{self.base_model_prefix}."

            def found(name: str) -> Any:
                return inner.get_submodule(name.removeprefix(prefix))

            for name, (kind, arguments) in modules_of(config, found).items():
                weight = found(name).weight
                # the meta device while weights are being loaded
                place = {
                    "dtype": weight.dtype,
                    "device": weight.device,
                }
                parent, _, leaf = name.rpartition(".")
                setattr(found(parent), leaf, kinds[kind](**arguments, **place))

    CompressedModel.__name__ = CompressedModel.__qualname__ = f"Specomp{base.__name__}"
    return CompressedModel

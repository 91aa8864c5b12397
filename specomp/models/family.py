"""A model family is data: where the decoder layers are and which of their linears share an input.
No forward code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from specomp.errors import UserError
from specomp.models.modules import Substitute

COMPRESSED_PREFIX = "specomp_"  # a compressed folder of a llama has the model_type "specomp_llama"


def base_model_type(config: Any) -> str:
    """The model_type, without the mark of a compressed folder: "llama" for "llama" and for
    "specomp_llama".
    """
    return str(config.model_type).removeprefix(COMPRESSED_PREFIX)


@dataclass(frozen=True)
class Site:
    """Linears fed by the same activation, so that one Gram serves them all. Names are relative to a
    decoder layer.
    """

    linears: tuple[str, ...]


@dataclass(frozen=True)
class Mlp:
    """Which linears make the inner dimensions z of a decoder layer's MLP, and which one reads them:
    z_j is made of output j of the inner linears alone. A linear that holds several of them (gate
    and up in one) has their outputs one after the other. Names are relative to a decoder layer.
    """

    inner: tuple[str, ...]
    down: str
    size: str  # field of the config that says how many inner dimensions all MLPs have


@dataclass(frozen=True)
class Attention:
    """Which linears make queries, keys and values of a decoder layer's attention, which one reads
    its outputs, head after head in all. Names are relative to a decoder layer.
    """

    queries: str
    keys: str
    values: str
    output: str
    # positions rotate dimension i of a head together with i + half a head; else they rotate nothing
    rotary: bool
    # model types that put a norm between these linears and the scores
    normed: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearSpec:
    """One compressible linear: what a method may know about it."""

    name: str  # full dotted module name, "model.layers.3.self_attn.q_proj"
    m: int  # out_features
    n: int  # in_features
    decoder_layer: int  # index of its decoder layer
    # index of its site within the decoder layer: (decoder_layer, site) names the shared input
    site: int
    kind: str  # name relative to the decoder layer, "self_attn.q_proj"

    @property
    def params(self) -> int:
        """Parameters of the dense weight, bias not counted."""
        return self.m * self.n


@dataclass(frozen=True)
class Unit:
    """What is decided about together: a linear by itself, or those of a functional unit, for an MLP
    the inner ones and then the one that reads them.
    """

    name: str  # of the module that holds its linears
    kind: Literal["linear", "mlp", "value_output", "query_key", "expert"]
    linears: tuple[LinearSpec, ...]
    # of attention: heads, and groups of heads that share keys and values
    heads: tuple[int, int] = (1, 1)
    rotary: bool = False  # see Attention

    @property
    def decoder_layer(self) -> int:
        """Index of its decoder layer."""
        return self.linears[0].decoder_layer

    @property
    def params(self) -> int:
        """Parameters of the dense weights."""
        return sum(x.params for x in self.linears)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Models with the same module names. To support one more, write a row like those in
    specomp/models/families.py.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` of the transformers configs it covers
    decoder_layers: str  # dotted name of the list of decoder layers, "model.layers"
    sites: tuple[Site, ...]
    # None: stored linear by linear
    mlp: Mlp | None = None
    attention: Attention | None = None

    def decoder(self, model: nn.Module) -> nn.Module:
        """Embeddings, decoder layers and final norm, without the LM head: the owner of the list of
        decoder layers.
        """
        return self._submodule(model, self.decoder_layers.rpartition(".")[0])

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(self._submodule(model, self.decoder_layers).children())

    def linears(self, model: nn.Module) -> list[LinearSpec]:
        """Every compressible linear, decoder layer by decoder layer, in the order of the sites.

        Raises UserError where a module of the family is absent or is neither an nn.Linear nor what
        specomp puts in its place.
        """
        specs = []
        for index, decoder_layer in enumerate(self.layers(model)):
            for number, site in enumerate(self.sites):
                for kind in site.linears:
                    name = f"{self.decoder_layers}.{index}.{kind}"
                    linear = self._checked_linear(decoder_layer, kind, name)
                    specs.append(
                        LinearSpec(
                            name, linear.out_features, linear.in_features, index, number, kind
                        )
                    )
        return specs

    def units(self, model: nn.Module) -> list[Unit]:
        """What a budget is shared out among, in the order of the linears."""
        return [Unit(x.name, "linear", (x,)) for x in self.linears(model)]

    def mlps(self, model: nn.Module) -> list[Unit]:
        """The MLP of every decoder layer as one unit; none where the family does not say what it is
        made of.
        """
        if self.mlp is None:
            return []
        by_name = {x.name: x for x in self.linears(model)}
        found = []
        for index in range(len(self.layers(model))):
            layer = f"{self.decoder_layers}.{index}"
            linears = tuple(by_name[f"{layer}.{x}"] for x in (*self.mlp.inner, self.mlp.down))
            found.append(Unit(f"{layer}.mlp", "mlp", linears))
        return found

    def attentions(self, model: Any) -> list[Unit]:
        """Of every decoder layer's attention, queries and keys as one unit, where nothing stands
        between them and the scores, and values and outputs as one; none where the family does not
        say what makes them. model: of transformers.
        """
        made = self.attention
        if made is None:
            return []
        config, by_name = model.config, {x.name: x for x in self.linears(model)}
        count = config.num_attention_heads
        heads = count, getattr(config, "num_key_value_heads", None) or count
        found = []
        for index in range(len(self.layers(model))):
            layer = f"{self.decoder_layers}.{index}"
            q, k, v, o = (
                by_name[f"{layer}.{x}"] for x in (made.queries, made.keys, made.values, made.output)
            )
            if not self.norms_queries(config):
                scores = Unit(f"{layer}.scores", "query_key", (q, k), heads, made.rotary)
                found.append(scores)
            found.append(Unit(f"{layer}.values", "value_output", (v, o), heads))
        return found

    def norms_queries(self, config: Any) -> bool:
        """Whether models of this config have a norm between queries and scores. config: of
        transformers.
        """
        return self.attention is not None and base_model_type(config) in self.attention.normed

    def functional_units(self, model: Any) -> list[Unit]:
        """Those of several linears. model: of transformers."""
        return [*self.mlps(model), *self.attentions(model)]

    def layer_ranges(self, model: nn.Module, size: int | None) -> Iterator[range]:
        """Consecutive ranges of `size` decoder-layer indices that cover the model; all of it at
        once when size is None.
        """
        count = len(self.layers(model))
        step = size or count
        for start in range(0, count, step):
            yield range(start, min(start + step, count))

    def _submodule(self, model: nn.Module, name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"{type(model).__name__} has no module '{name}', which family '{self.name}'"
                " expects: check decoder_layers of the family in specomp/models/families.py."
            ) from error

    def _checked_linear(
        self, decoder_layer: nn.Module, kind: str, name: str
    ) -> nn.Linear | Substitute:
        supported = "supported are torch.nn.Linear and what specomp puts in its place"
        try:
            module = decoder_layer.get_submodule(kind)
        except AttributeError as error:
            raise UserError(
                f"{name} does not exist in {type(decoder_layer).__name__}, but family '{self.name}'"
                f" lists it ({supported}): give this model a family of its own in"
                " specomp/models/families.py."
            ) from error
        if not isinstance(module, nn.Linear | Substitute):
            raise UserError(
                f"{name} is a {_type_name(module)}; {supported}: load the model unquantized and"
                " without adapters."
            )
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise UserError(
                f"{name} is a {_type_name(module)} with {module.weight.dtype} weights; {supported}"
                " with float weights: load the model unquantized."
            )
        return module


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"

"""Where models come from: one class per source, named by the `_target_` of conf/model/*.yaml. The
embedded default is in gguf.py.
"""

import logging
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from specomp.cache import Cache
from specomp.errors import UserError, one_line
from specomp.models.families import family_of
from specomp.models.family import ModelFamily
from specomp.models.files import checked_folder, folder_hashes, model_folder, weight_names
from specomp.models.hub import downloaded, hub_errors
from specomp.models.load import (
    LoadedModel,
    cast_weights,
    check_shape,
    config_of_shape,
    context_length,
    dense_family,
    open_model,
    open_streamed,
    quiet,
    read_config,
    told,
    torch_device,
)
from specomp.settings import configurable

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")


@configurable
class Source:
    """What every source is told: how to call the model, and the precision and place it runs in."""

    name: str  # short label in records and tables
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    # transformers' device_map, to spread over several devices; then device must be auto
    device_map: str | None
    stream: bool = False  # decoder layers stay on disk, and come in one at a time

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """JSON-able: what determines the weights. Never a path or a device; loads no model."""
        raise AssertionError("abstract")

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The architecture; loads no model, and asks no network where the yaml says the shape."""
        raise AssertionError("abstract")

    def max_length(self, cache: Cache) -> int:
        """Context of the model in tokens; loads no model."""
        raise AssertionError("abstract")

    def tokenizer(self, cache: Cache) -> PreTrainedTokenizerBase:
        """The model's tokenizer; loads no model."""
        raise AssertionError("abstract")

    def load(self, cache: Cache) -> LoadedModel:
        """The model in eval mode on its device."""
        raise AssertionError("abstract")

    def side_files(self, cache: Cache) -> Path | None:
        """Where what goes with the model lies, such as its licence; None where nothing does."""
        return None

    @property
    def download(self) -> str | None:
        """The repository that its weights come from, where they are not on this machine already."""
        return None

    def unstreamable(self) -> str | None:
        """Why `stream` cannot be: what to do instead, or None."""
        if self.device_map is not None:
            return (
                f"model.device_map={self.device_map} spreads the whole model over devices: leave it"
                " unset"
            )
        return None


@configurable
class HubModel(Source):
    """A repository of the Hugging Face hub at one commit."""

    repo: str
    revision: str  # commit hash; a branch name works but does not pin
    # bin: torch pickles, read by torch's weights-only unpickler, which runs no code
    weights: Literal["safetensors", "bin"]
    trust_remote_code: bool  # run modelling code of the repository instead of transformers' own
    shape: dict[str, Any] | None = (
        None  # the published config, checked when the model is loaded; None: read from the hub
    )

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """What determines the weights: the commit, also where a branch was named."""
        return {"source": "hub", "repo": self.repo, "revision": self._commit, "dtype": self.dtype}

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The published shape; without one the hub's config."""
        return self._config() if self.shape is None else config_of_shape(self.shape, self.name)

    def max_length(self, cache: Cache) -> int:
        """Context of the model in tokens."""
        return context_length(self._config())

    def tokenizer(self, cache: Cache) -> PreTrainedTokenizerBase:
        """The tokenizer of the repository."""
        with hub_errors(self.repo, self.revision), quiet():
            return AutoTokenizer.from_pretrained(
                self.repo, revision=self._commit, trust_remote_code=self.trust_remote_code
            )

    def load(self, cache: Cache) -> LoadedModel:
        """Download (once, into the hub's own cache) and open. Raises UserError offline, without
        access, or if unsupported.
        """
        config = self._config()
        check_shape(self.shape, config, self.repo)
        family = dense_family(config, self.repo)
        tokenizer = self.tokenizer(cache)
        # without it transformers may fetch the weights of another commit (a conversion bot's), or
        # ask the hub for such a conversion
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
        if self.stream:
            folder = checked_folder(str(downloaded(self.repo, self._commit)))
            return streamed(
                folder,
                config,
                tokenizer,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        with hub_errors(self.repo, self.revision):
            model = open_model(
                self.repo,
                config,
                dtype=self.dtype,
                device=self.device,
                device_map=self.device_map,
                revision=self._commit,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=self.weights == "safetensors",
            )
        if self.weights == "safetensors" and (found := self.side_files(cache)) is not None:
            checked_folder(str(found))
        return LoadedModel(model, tokenizer, family)

    def side_files(self, cache: Cache) -> Path | None:
        """The repository in the hub's cache, as far as it was downloaded."""
        config = try_to_load_from_cache(self.repo, "config.json", revision=self._commit)
        return Path(config).parent if isinstance(config, str) else None

    @property
    def download(self) -> str | None:
        """Its name on the hub."""
        return self.repo

    def unstreamable(self) -> str | None:
        """Pickles can only be read whole."""
        if self.weights == "bin":
            return (
                "model.weights=bin are pickles, which are read whole: save the model once with"
                " save_pretrained, and use model=local"
            )
        return super().unstreamable()

    def _config(self) -> PreTrainedConfig:
        with hub_errors(self.repo, self.revision):
            return read_config(
                self.repo, revision=self._commit, trust_remote_code=self.trust_remote_code
            )

    @cached_property
    def _commit(self) -> str:
        """The commit that the revision is now: a branch moves, a run's weights must not."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        with hub_errors(self.repo, self.revision):
            read_config(self.repo, revision=self.revision, trust_remote_code=self.trust_remote_code)
        found = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        commit = Path(found).parent.name if isinstance(found, str) else ""
        if not COMMIT.fullmatch(commit):
            log.warning(
                "%s: revision '%s' is not a commit hash, so results are not tied to fixed weights.",
                self.repo,
                self.revision,
            )
            return self.revision
        log.info("%s: revision '%s' is commit %s.", self.repo, self.revision, commit)
        return commit


@configurable
class LocalModel(Source):
    """A folder with config.json, safetensors and a tokenizer, as save_pretrained writes it."""

    path: str
    trust_remote_code: bool  # run modelling code found in the folder

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """What determines the weights: the content of the files, wherever they are."""
        folder, _ = self._checked
        return {
            "source": "local",
            "files": folder_hashes(folder, cache, code=self.trust_remote_code),
            "dtype": self.dtype,
        }

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The folder's config.json."""
        return self._checked[1]

    def max_length(self, cache: Cache) -> int:
        """Context of the model in tokens."""
        return context_length(self._checked[1])

    def tokenizer(self, cache: Cache) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder."""
        return folder_tokenizer(self._checked[0], trust_remote_code=self.trust_remote_code)

    def side_files(self, cache: Cache) -> Path | None:
        """The folder itself."""
        return self._checked[0]

    def load(self, cache: Cache) -> LoadedModel:
        """Open the folder. Raises UserError when it is damaged, unsupported or compressed
        already.
        """
        folder, config = self._checked
        family = dense_family(config, folder)
        tokenizer = folder_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        options = {
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.stream:
            return streamed(folder, config, tokenizer, **options)
        model = open_model(folder, config, device_map=self.device_map, **options)  # type: ignore[arg-type]
        return LoadedModel(model, tokenizer, family)

    @cached_property
    def _checked(self) -> tuple[Path, PreTrainedConfig]:
        """The folder and its config: of what is wrong with them first what no repair of the files
        would help.
        """
        folder = model_folder(self.path)
        config = folder_config(folder, trust_remote_code=self.trust_remote_code)
        family = dense_family(config, folder)
        checked_folder(self.path)
        check_depth(folder, config, family)
        if (settings := folder / "generation_config.json").is_file():
            with told(f"{settings} cannot be used"), quiet():
                GenerationConfig.from_pretrained(folder)
        return folder, config


@configurable
class RandomModel(Source):
    """Random weights of a given architecture with a byte-level tokenizer: for tests and shape
    benchmarks, offline.
    """

    architecture: str  # transformers model_type
    seed: int
    # fields of the architecture's config; vocab_size and special tokens follow the tokenizer if
    # absent
    config: dict[str, Any]

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """What determines the weights; the libraries that draw them included."""
        versions = {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }
        settings = {
            "architecture": self.architecture,
            "seed": self.seed,
            "config": self.config,
            "dtype": self.dtype,
        }
        return {"source": "random", **settings, **versions}

    def config_for_plan(self, cache: Cache) -> PreTrainedConfig:
        """The config of the yaml."""
        return self._config()

    def max_length(self, cache: Cache) -> int:
        """Context of the model in tokens."""
        return context_length(self._config())

    def tokenizer(self, cache: Cache) -> PreTrainedTokenizerBase:
        """The byte-level tokenizer."""
        return byte_tokenizer()

    def load(self, cache: Cache) -> LoadedModel:
        """Draw the weights in float32 from the seed, leaving torch's global generator as it was."""
        config = self._config()
        family = dense_family(config, self.name)
        target = torch_device(self.device, self.device_map)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(self.seed)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        model = cast_weights(model, getattr(torch, self.dtype)).to(target).eval()  # type: ignore[arg-type]
        return LoadedModel(model, self.tokenizer(cache), family)

    def unstreamable(self) -> str | None:
        """There is nothing on disk."""
        return (
            f"{self.name} draws its weights in memory: use a model that is a folder of safetensors"
        )

    def _config(self) -> PreTrainedConfig:
        tokenizer = byte_tokenizer()
        specials = {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        fields = {"vocab_size": len(tokenizer), **specials, **self.config}
        if fields["vocab_size"] < len(tokenizer):
            raise UserError(
                f"model.config.vocab_size={fields['vocab_size']} is below the byte-level"
                f" tokenizer's {len(tokenizer)} tokens."
            )
        try:
            return AutoConfig.for_model(self.architecture, **fields)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(
                f"model.architecture={self.architecture} with this model.config is refused:"
                f" {one_line(error)}"
            ) from error


def check_depth(folder: Path, config: PreTrainedConfig, family: ModelFamily) -> None:
    """Whether the files have as many decoder layers as config.json says, before any is built.
    Raises UserError.
    """
    told, leaf = config.num_hidden_layers, family.decoder_layers.rpartition(".")[2]
    inside = re.compile(rf"(?:^|\.){re.escape(leaf)}\.(\d+)\.")
    found = {int(x.group(1)) for name in weight_names(folder) if (x := inside.search(name))}
    if not isinstance(told, int) or not 0 < told <= len(found):
        raise UserError(
            f"{folder / 'config.json'} says num_hidden_layers={told}, and the files have weights of"
            f" {len(found)} decoder layers: the folder is incomplete, or its config.json is of"
            " another model."
        )


def streamed(folder: Path, config: PreTrainedConfig, tokenizer: Any, **options: Any) -> LoadedModel:
    """The model of a checked folder whose decoder layers come in one at a time; see
    `open_streamed`.
    """
    family = family_of(config)
    model, store = open_streamed(folder, config, family, **options)
    log.info(
        "%s is streamed: its %d decoder layers are read from disk one at a time.",
        folder,
        len(store.layers),
    )
    return LoadedModel(model, tokenizer, family, store)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without training: 256 bytes and three special tokens, an exact round trip on any
    text, pads on the left.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={character: index for index, character in enumerate(alphabet)}, merges=[]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **specials,
    )


def folder_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a local folder. Raises UserError when it is unreadable."""
    with told(f"{folder / 'config.json'} cannot be used"):
        return read_config(folder, trust_remote_code=trust_remote_code)


def folder_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder. Raises UserError when it is absent or unreadable."""
    remedy = "copy the tokenizer files of the original model into it"
    with told(f"{folder} has no usable tokenizer", remedy), quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)

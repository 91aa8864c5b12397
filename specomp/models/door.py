"""What leaves is checked at the door: a folder is opened as its user will open it, and must compute
what the model did.

Always by the class that its config.json names, with one decoder layer in memory: every weight has
its place, and the logits of a few tokens are the same. Once for every version of this code, class
of model and form also in a process of its own that cannot import specomp, where it is made the way
serving engines make it too.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from specomp.cache import Cache, digest
from specomp.errors import UserError
from specomp.models.calls import Given, hidden_output, recorded, replaced
from specomp.models.families import family_of
from specomp.models.family import ModelFamily
from specomp.models.files import some
from specomp.models.load import open_streamed, quiet, read_config, told
from specomp.models.modules import evaluating

log = logging.getLogger(__name__)

TOKENS = 16  # of the comparison
# Largest relative error of the logits. Factors are stored as they are, and only the order of sums
# may differ; products of factors are rounded once more. Random weights give more than 1.
SAME = {"factors": 1e-3, "dense": 1e-2}
HALF = {"factors": 0.02, "dense": 0.2}
LARGE = (
    2**30
)  # bytes: of a larger folder the process of its own opens the first decoder layers only
FIRST = 2
ENGINE = "engine: "  # in front of why the model cannot be made as serving engines make it
SWITCH = "SPECOMP_FRESH_CHECK"  # 0: no process of its own


# what tokenizers differ in: BOS, blanks, a special token in a text
TEXTS = ("hello", " he llo  <s>x\n", "Größe 12,5")


class Walk:
    """The logits of a model whose decoder layers are in memory one after the other."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model, family_of(model.config)
        self.ids = token_ids(model)
        calls = recorded(model, self.family, self.ids)
        self.hidden, self.layers = calls.hidden, calls.layers

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Go through decoder layer `index`, which has its final numbers now."""
        args, kwargs = self.layers[index]
        layer = self.family.layers(self.model)[index]
        self.hidden = hidden_output(layer(self.hidden, *args, **kwargs))

    def logits(self) -> Tensor:
        """(TOKENS, vocabulary), after the last decoder layer."""
        given = [Given(layer, self.hidden) for layer in self.family.layers(self.model)]
        with replaced(self.model, self.family, given):
            return logits(self.model)


def token_ids(model: PreTrainedModel) -> Tensor:
    """Ids (1, TOKENS) spread over the vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(1, TOKENS + 1, device=embeddings.weight.device) * 7919
    return ids[None] % embeddings.weight.shape[0]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """(TOKENS, vocabulary) in float32 on the CPU, of `token_ids`."""
    with evaluating(model):
        output: Any = model(input_ids=token_ids(model), use_cache=False)
        return output.logits[0].float().cpu()  # type: ignore[no-any-return]


def check(
    folder: Path,
    name: Path,
    wanted: Tensor | None,
    *,
    form: str,
    half: bool,
    device: str,
    cache: Cache,
) -> str | None:
    """Raises UserError where the model in `folder`, which is to be called `name`, is not the one
    that was saved. Returns why serving engines would not get that model, None where they would.

    wanted: `logits` before saving, None where there are none; form: "factors" or "dense"; half:
    whether weights were of 16 bits; device: where the model was.
    """
    allowed = (HALF if half else SAME)[form]
    config = read_config(folder)
    family = family_of(config)
    with _refused(folder, name):
        model, store = open_streamed(folder, config, family, dtype="auto", device=device)
    used = store.used() | {
        x for x in model.state_dict() if not x.startswith(f"{family.decoder_layers}.")
    }
    base = f"{model.base_model_prefix}."
    stored = store.files.stored
    nameless = sorted(x for x in stored if x not in used and f"{base}{x}" not in used)
    if nameless:
        raise UserError(
            f"{name} is not saved: {len(nameless)} weights would find no place in"
            f" {type(model).__name__} ({some(nameless)}); see decoder_layers of its family in"
            " specomp/models/families.py."
        )
    if wanted is not None:
        compare(wanted, logits(model), allowed, f"{name} is not saved: opened again it")
        if os.environ.get(SWITCH) != "0":
            return _check_fresh(folder, name, model, family, form, allowed, cache)
    return None


def check_tokenizer(folder: Path, name: Path, tokenizer: Any) -> None:
    """Raises UserError where the tokenizer in `folder` gives other ids than the one saved."""
    with _refused(folder, name), told(f"{name} is not saved: its tokenizer"), quiet():
        again = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        wanted, got = (x(text, verbose=False)["input_ids"] for x in (tokenizer, again))
        if wanted != got:
            raise UserError(
                f"{name} is not saved: opened again its tokenizer makes {got} of {text!r}, not"
                f" {wanted}: save the model without it, and copy its files by hand."
            )


def compare(wanted: Tensor, got: Tensor, allowed: float, what: str) -> None:
    if wanted.shape != got.shape or not torch.equal(wanted.isfinite(), got.isfinite()):
        raise UserError(f"{what} gives other logits {tuple(got.shape)}, or such as are no numbers.")
    finite = wanted.isfinite()
    if not finite.all():
        log.warning("The logits of the saved model are not all finite.")
    off = (got[finite].double() - wanted[finite].double()).norm()
    error = float(off / wanted[finite].double().norm().clamp_min(1e-30))
    if not error <= allowed:
        raise UserError(
            f"{what} gives logits that differ by {error:.3g} of their size (allowed: {allowed:g})"
            " from those before: its class does not compute what this model does; report this with"
            " the model's config.json."
        )
    log.debug("Logits after opening again: relative error %.2e.", error)


class _refused:  # noqa: N801 (a context manager used like a function)
    """What opening a new folder complains of, said of the folder that is not there yet."""

    def __init__(self, folder: Path, name: Path) -> None:
        self.folder, self.name = folder, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            said = str(error).replace(str(self.folder), str(self.name))
            raise UserError(f"{self.name} is not saved, since it could not be opened: {said}")


OPEN = """
import json, sys
sys.modules["specomp"] = None
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, layers, depth, ids, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
if depth := int(depth):
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    inside = lambda name: int(name.removeprefix(layers + ".").split(".")[0]) < depth
    if modules := getattr(config, "specomp_modules", None):
        config.specomp_modules = {k: v for k, v in modules.items() if inside(k)}
model = AutoModelForCausalLM.from_pretrained(
    folder, config=config, trust_remote_code=True, dtype="auto"
).eval()
ids = torch.tensor(json.loads(ids))
with torch.no_grad():
    found = {"logits": model(input_ids=ids, use_cache=False).logits[0].float().contiguous()}
if "AutoModel" in (getattr(config, "auto_map", None) or {}):
    # as vLLM does: without a head, parameters on the meta device, buffers where they are made
    plain = nn.Module.register_parameter
    def on_meta(module, name, value):
        plain(module, name, value)
        if value is not None:
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
    try:
        nn.Module.register_parameter = on_meta
        engine = AutoModel.from_config(config, trust_remote_code=True).eval()
        nn.Module.register_parameter = plain
        unfilled = [x for x, value in engine.named_buffers() if value.is_meta]
        assert not unfilled, f"{len(unfilled)} buffers are never filled, such as {unfilled[0]}"
        engine.load_state_dict(model.base_model.state_dict(), assign=True)
        for key, inner in (("hidden", model.base_model), ("engine", engine)):
            with torch.no_grad():
                found[key] = inner(input_ids=ids, use_cache=False)[0][0].float().contiguous()
    except Exception as error:
        print("engine:", *str(error).split())
save_file(found, out)
"""


def _check_fresh(
    folder: Path,
    name: Path,
    model: PreTrainedModel,
    family: ModelFamily,
    form: str,
    allowed: float,
    cache: Cache,
) -> str | None:
    code = {x.name: x.read_text() for x in folder.glob("*.py")}  # that of one's own modules too
    packed = getattr(model.config, "quantization_config", None) is not None
    versions = [_code(), torch.__version__, transformers.__version__]
    memo = digest([*versions, type(model).__name__, str(model.dtype), form, packed, code])
    known = f"doors/{memo[:24]}.json"
    if (before := cache.load_json(known)) is not None:
        return before["unserved"]  # type: ignore[no-any-return]
    log.info("Open the folder as its user will, without specomp: once for this kind of model here.")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    layers = family.layers(model)
    depth = min(FIRST, len(layers)) if size > LARGE else 0
    with replaced(model, family, layers[:depth] if depth else layers):
        wanted = logits(model)
    ids = str(token_ids(model).tolist())
    with tempfile.TemporaryDirectory(prefix="specomp-") as temporary:
        out = Path(temporary) / "logits.safetensors"
        typed = [str(folder), family.decoder_layers, str(depth), ids, str(out)]
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *typed],
            cwd=temporary,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": temporary,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(
                f"{name} is not saved: where specomp is not installed it does not open ({last})."
            )
        got = load_file(out)
    what = f"{name} is not saved: opened where specomp is not installed it"
    compare(wanted, got["logits"], allowed, what)
    said = [x.removeprefix(ENGINE) for x in done.stdout.splitlines() if x.startswith(ENGINE)]
    if "engine" in got:
        try:
            compare(got["hidden"], got["engine"], allowed, "without its head it")
        except UserError as error:
            said = [str(error)]
    unserved = said[0] if said else None
    about = {"class": type(model).__name__, "form": form, "unserved": unserved}
    cache.save_json(known, about)
    return unserved


@once
def _code() -> str:
    """Of the files that decide what a folder holds."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *here.parent.glob("forms/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

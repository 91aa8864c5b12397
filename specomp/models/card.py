"""The model card of a folder: README.md, with what the hub reads of it in front.

What is in it comes from specomp.json and from what was measured; a number stands beside what it
counts. A card that somebody else wrote, or changed the first line of, is left alone.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCardData

from specomp import __version__
from specomp.disk import atomic_path, remove
from specomp.models.files import GGUF

CARD = "README.md"
PLACE = "FOLDER"  # where the model lies, in the snippet that opens it
OURS = "<!-- written by specomp, which brings it up to date until this line is gone -->"
FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
# of the source model's card, what stays true
KEPT = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Measured:
    """One number: on what, which metric, of the dense model (None: not measured) and of this."""

    benchmark: str
    metric: str
    dense: float | None
    compressed: float


def write_card(
    folder: Path,
    info: Mapping[str, Any],
    *,
    name: str,
    source: Path | None,
    measured: Sequence[Measured] = (),
) -> bool:
    """Write the card of a saved model, unless there is one that is not ours. Whether it was
    written.

    info: what specomp.json says; name: of the model; source: a folder with the source model's card.
    """
    path = folder / CARD
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if there is not None and OURS not in there:
        return False
    front = _data(info, name, source, measured).to_yaml()
    tokenizer = any(folder.glob("tokenizer*"))
    serving = _serving(info, folder)
    told = _sections(info, measured, serving, tokenizer)
    sections = [OURS, f"# {' '.join(name.split())}", *told]
    text = "\n\n".join([f"---\n{front}\n---", *sections]) + "\n"
    if there == text:
        return False
    if there is None:  # a folder or a link to nowhere is in its place
        remove(path)
    with atomic_path(path) as writing:
        writing.write_text(text, encoding="utf-8")
    return True


def _data(
    info: Mapping[str, Any], name: str, source: Path | None, measured: Sequence[Measured]
) -> ModelCardData:
    """What the hub understands."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=x.benchmark.partition("@")[0],
            dataset_name=x.benchmark,
            metric_type="perplexity" if x.metric == "ppl" else x.metric,
            metric_value=x.compressed,
        )
        for x in measured
        if math.isfinite(x.compressed) and (x.metric == "ppl" or x.metric.startswith("acc"))
    ]
    repo = _base(info).get("repo")
    unnamed = "converted" if info.get("converted") else "own-method"
    return ModelCardData(
        base_model=repo,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["specomp", "compression", str(info.get("method") or unnamed)],
        metrics=sorted({str(x.metric_type) for x in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **_kept(source),
    )


def _kept(source: Path | None) -> dict[str, Any]:
    """Licence and languages of the source model's card, as they are written there."""
    path = None if source is None else source / CARD
    if path is None or not path.is_file():
        return {}
    front = FRONT.match(path.read_text(encoding="utf-8-sig", errors="replace"))
    try:  # BaseLoader: the language `no` is Norwegian, and no truth value
        data = yaml.load(front[1], yaml.BaseLoader) if front else None
    except (yaml.YAMLError, RecursionError):
        return {}
    found = {x: data[x] for x in KEPT if x in data} if isinstance(data, Mapping) else {}
    return {x: y for x, y in found.items() if _plain(y)}


def _plain(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(x, str) for x in value)
    )


def _base(info: Mapping[str, Any]) -> Mapping[str, Any]:
    found = (info.get("base_model") or {}).get("source")
    return found if isinstance(found, Mapping) else {}


def _sections(
    info: Mapping[str, Any], measured: Sequence[Measured], serving: str, tokenizer: bool
) -> list[str]:
    base, read = _base(info), info.get("calibration") or {}
    of = base.get("repo") or (info.get("base_model") or {}).get("name")
    row = " ".join([str(info.get("method") or "a method of its own"), *_changes(info)])
    text = _text(read)
    other = info.get("converted") or {}  # made by somebody else (models/convert.py)
    files = [f"{_code(name)} sha256 `{found}`" for name, found in other.get("files", {}).items()]
    made = (
        [f"Converted from a checkpoint of {_code(other.get('format'))}: {', '.join(files)}"]
        if other
        else [f"Row: {_code(row)}", f"Budget: {_budget(info)}"]
    )
    if of:
        exact = [f"{key} `{base[key]}`" for key in ("revision", "sha256") if base.get(key)]
        made.insert(0, ", ".join([f"Source model: {_code(of)}", *exact]))
    if read:
        made.append(
            f"Calibrated on {text or 'token ids'}: {read.get('samples')} samples of"
            f" {read.get('length')} tokens, sha256 `{str(read.get('hash'))[:16]}`"
        )
    if info.get("command"):
        made.append(f"Command: {_code(info['command'])}")
    record = info.get("record")
    made.append(f"specomp {__version__}" + (f", record `{str(record)[:12]}`" if record else ""))
    fitted = (
        "How it was compressed, and on which text, is not known here. Measure it before you use it."
        if other
        else f"It is fitted to its calibration text{f' ({text})' if text else ''}: on other texts"
        " and languages it loses more. Measure on your own before you use it."
    )
    limits = [
        fitted,
        "Safety is not evaluated: refusals, bias and toxicity may differ from the source model's.",
        "The source model's licence and terms hold for it too.",
    ]
    whose = _code(of) if of else "A model"
    begin = (
        f"{whose} compressed elsewhere: a checkpoint of {_code(other.get('format'))}, converted by"
        " specomp, which did not compress it."
        if other
        else f"{whose} made smaller with specomp: {_code(row)}, {_budget(info)}."
    )
    return [
        begin,
        "## Loading",
        _snippet(info, tokenizer=tokenizer),
        serving,
        "## How it was made",
        _items(made),
        *_sizes(info),
        "## Measured",
        _measured(measured),
        "## Limits",
        _items(limits),
    ]


def _changes(info: Mapping[str, Any]) -> list[str]:
    """What differs from the method's row; where nobody typed it, the bits of its grids."""
    changes, grids = info.get("changes"), info.get("grids")
    if changes or not grids:
        return list(changes or ())
    return [f"on {' or '.join(map(str, grids))} bits"]


def _text(read: Mapping[str, Any]) -> str:
    """What was calibrated on; of a mixture all of it."""
    source = read.get("source")
    parts = source.get("parts") if isinstance(source, Mapping) else None
    found = [x.get("source") for x in parts.values()] if isinstance(parts, Mapping) else [source]
    return "; ".join(
        str(x["fingerprint"]) for x in found if isinstance(x, Mapping) and x.get("fingerprint")
    )


def _code(text: Any) -> str:
    """On one line, as it is."""
    plain = " ".join(str(text).split())
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {x}" for x in lines)


def _sizes(info: Mapping[str, Any]) -> list[str]:
    ledger = info.get("ledger") or {}
    dense, small = ledger.get("dense"), ledger.get("compressed")
    if not (dense and small):
        return []
    counted = {
        "linear_params": "parameters of the linears in decoder layers",
        "model_params": "parameters of the whole model",
        "model_bytes": "bytes stored",
        "held_bytes": "bytes in memory",
    }
    rows = [
        (what, f"{dense[x]:,}", f"{small[x]:,}", f"{small[x] / dense[x]:.3f}")
        for x, what in counted.items()
        if dense.get(x) and small.get(x)  # of older folders
    ]
    if dense.get("linear_bits") and small.get("linear_bits"):
        a, b = (x["linear_bits"] / dense["linear_params"] for x in (dense, small))
        rows.insert(
            1, ("stored bits a weight of these linears", f"{a:.2f}", f"{b:.2f}", f"{b / a:.3f}")
        )
    return [
        "## Sizes",
        _table(["", "dense", "compressed", "compressed / dense"], rows),
        "Compression is the fraction removed of the weights of the linears inside the decoder"
        " layers: embeddings, head, norms and biases do not count.",
    ]


def _budget(info: Mapping[str, Any]) -> str:
    if info.get("kl") is not None:
        found = info.get("ledger") or {}
        measured = found.get("measured_kl")
        told = "" if measured is None else f", measured {measured:.4g} on held-out calibration text"
        return f"a KL of at most {info['kl']:g} to the dense model{told}"
    if info.get("bits") is not None:
        return f"{info['bits']:g} stored bits a weight"
    if (removed := info.get("compression")) is not None:
        return f"compression {100 * removed:.6g} %"
    sizes = info.get("ledger") or {}
    dense, stored = sizes.get("dense", {}), sizes.get("compressed", {})
    if 0 < stored.get("linear_bits", 0) < dense.get("linear_bits", 0):
        return f"{stored['linear_bits'] / dense['linear_params']:.2f} stored bits a weight"
    return "no budget stated"


def _has_code(info: Mapping[str, Any]) -> bool:
    """Whether classes of the folder's own open it."""
    return info.get("form") == "factors" and not info.get("stock")


def _snippet(info: Mapping[str, Any], *, tokenizer: bool) -> str:
    """How it is opened."""
    own, gguf = _has_code(info), "gguf" in info
    lines = ["```python"]
    names = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    names = f"AutoConfig, {names}" if gguf else names
    lines += [f"from transformers import {names}", ""]
    if own:
        lines.append("# its code is in the folder; after `import specomp` it needs no trust")
    trust = ", trust_remote_code=True" if own else ""
    how = 'dtype="auto"'
    if gguf:  # what config.json says transformers does not all read from the file
        lines.append(f'config = AutoConfig.from_pretrained("{PLACE}")')
        how = f'gguf_file="{GGUF}", config=config'
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{PLACE}", {how}{trust})')
    if tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}"{trust})')
    return "\n".join([*lines, "```"])


def _serving(info: Mapping[str, Any], folder: Path) -> str:
    """How an engine opens it, which asks config.json for AutoModel where the code is in the
    folder.
    """
    if why := info.get("unserved"):
        return f"Serving engines refuse it: {why}."
    if gguf := info.get("gguf"):
        return (
            f"Run by llama.cpp ({gguf['type']}): `llama-cli -m {GGUF}`, `llama-server -m {GGUF}`."
        )
    own = _has_code(info)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if own and "AutoModel" not in config.get("auto_map", {}):
        return "Serving engines refuse it: it is older than what they need; save it again."
    if info.get("stock"):
        return (
            f"A stock architecture of compressed-tensors' integers: `vllm serve {PLACE}` takes its"
            " own kernels for them (vLLM 0.32 opens it; what it generates has not been compared)."
        )
    options = " --model-impl transformers --trust-remote-code" if own else ""
    return f"Served by vLLM: `vllm serve {PLACE}{options}`."


def _measured(measured: Sequence[Measured]) -> str:
    if not measured:
        return "Nothing yet."
    rows = []
    for x in measured:
        dense = "--" if x.dense is None else f"{x.dense:,.4g}"
        rows.append((x.benchmark, x.metric, dense, f"{x.compressed:,.4g}"))
    return _table(["benchmark", "metric", "dense", "compressed"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in row)} |" for row in lines)

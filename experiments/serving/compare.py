"""Greedy tokens of compressed folders in vLLM, beside those of transformers. Exit code 1 where they
differ.

    make serving                        makes the environment of vLLM (.serving), then this
    python experiments/serving/compare.py .serving/bin/python [NAME ...]

NAME: of `folders`; all of them where none is given.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import specomp
from specomp import rows
from specomp.cache import Cache
from specomp.settings import default_cache

HERE = Path(__file__).parent
PROMPTS, LENGTH, NEW = 20, 32, 64
# Two logits this near, of some tens, are one to rounding: an engine sums in another order.
TIE = 1e-3
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def smollm2() -> PreTrainedModel:
    """The embedded default."""
    source = rows.built(rows.load("model", "smollm2_135m"), "model")
    model: PreTrainedModel = source.load(Cache(default_cache())).model
    return model


def small(name: str, **fields: Any) -> PreTrainedModel:
    """Another family, of random weights: biases, heads that share keys and values, other names."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # no logits that are all alike
        if parameter.dim() == 2 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


GROUPED = {"intermediate_size": 512, "num_key_value_heads": 2}


def folders() -> dict[str, tuple[Callable[[], PreTrainedModel], Any, float]]:
    """Model, row and ratio by name."""
    row, even = specomp.method, {"mlp": {"round_to": 8}}
    polish = rows.slot("training", "polish", steps_factor=0.04)
    return {
        "factors": (smollm2, "svd_llm", 0.2),
        "pivoted": (smollm2, row("svd_llm", packing="pivoted"), 0.2),
        "adasvd": (smollm2, "adasvd", 0.4),
        "cut": (smollm2, "specomp", 0.4),
        "cut_all": (smollm2, row("specomp", units="cut_all"), 0.4),
        "gated": (smollm2, row("specomp_low_rank", training=polish), 0.2),
        "opt": (lambda: small("OPT", ffn_dim=512), row("svd_llm", packing="pivoted"), 0.2),
        "opt_cut": (lambda: small("OPT", ffn_dim=512), "specomp", 0.4),
        "qwen2": (lambda: small("Qwen2", **GROUPED), "specomp", 0.4),
        # layers of other content than their neighbours, sizes that two processes can share
        "mixed": (
            lambda: small("Qwen2", **GROUPED),
            row("specomp", packing="factors", units=even),
            0.3,
        ),
        "mistral": (lambda: small("Mistral", sliding_window=16, **GROUPED), "specomp", 0.4),
        "phi3": (lambda: small("Phi3", **GROUPED), "specomp", 0.4),
        "gemma2": (lambda: small("Gemma2", head_dim=64, **GROUPED), "svd_llm", 0.2),
        "qwen3": (lambda: small("Qwen3", head_dim=64, **GROUPED), "svd_llm", 0.2),
    }


@cache
def text_ids() -> torch.Tensor:
    """Token ids of the embedded text, which every Python brings along."""
    source = rows.built(rows.load("model", "smollm2_135m"), "model")
    tokenizer = source.tokenizer(Cache(default_cache()))
    text = rows.built(rows.load("corpus", "pydocs"), "corpus").text()[:100_000]
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def made(name: str, folder: Path) -> list[list[int]]:
    """Write one folder; prompts for it."""
    model, row, ratio = folders()[name]
    dense = model()
    ids = text_ids() % dense.config.vocab_size
    tokens = ids[: 16 * 256].reshape(16, 256)
    specomp.compress(dense, tokens, row, ratio, cache=default_cache())
    specomp.save(dense, folder)
    starts = range(20_000, 20_000 + PROMPTS * 50, 50)
    return [ids[x : x + LENGTH].tolist() for x in starts]


@torch.no_grad()
def by_transformers(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens, one prompt after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        found.append(out[0, len(prompt) :].tolist())
    return found


def by_engine(python: Path, what: str, job: dict[str, Any]) -> Any:
    """What engine.py says to a job. Raises SystemExit with the last line of one that failed."""
    cores = "|".join(map(str, range(job.get("tensor_parallel", 1))))
    own = {"VLLM_CPU_OMP_THREADS_BIND": cores} if "|" in cores else {}  # a core for each process
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "job.json", Path(temporary) / "out.json"
        given.write_text(json.dumps(job))
        done = subprocess.run(
            [python, HERE / "engine.py", what, given, out],
            env={**os.environ, **ENGINE, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not out.exists():
            wrong = [
                x
                for x in done.stderr.splitlines()
                if "Error" in x and "Engine core initialization" not in x
            ]
            raise SystemExit(f"The engine failed: {(wrong or [done.stderr[-500:]])[-1]}")
        return json.loads(out.read_text())


@torch.no_grad()
def parted(
    folder: Path, prompt: Sequence[int], ours: Sequence[int], other: Sequence[int]
) -> str | None:
    """Where two continuations part; None: nowhere, or where both tokens have one logit."""
    at = next((i for i, (a, b) in enumerate(zip(ours, other, strict=True)) if a != b), None)
    if at is None:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(torch.tensor([[*prompt, *ours[:at]]])).logits[0, -1]
    gap = float(logits[ours[at]] - logits[other[at]])
    said = f"token {at}: {ours[at]} and {other[at]}, logits {gap:.2g} apart"
    return f"tie at {said}" if gap <= TIE else said


def main() -> int:
    """Every folder: how many continuations are the same."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("python", type=Path, help="of the environment that has vLLM")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes; of factors only")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(folders())}")
    typed = parser.parse_args()
    if not typed.python.is_file():
        parser.error(f"there is no {typed.python}: make serving makes an environment with vLLM")
    if unknown := [x for x in typed.names if x not in folders()]:
        parser.error(f"there is no folder {unknown[0]!r}: {', '.join(folders())}")
    wrong = 0
    print("| folder | same | ties | differ |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in typed.names or folders():
            folder = Path(temporary) / name
            prompts = made(name, folder)
            job = {"folder": str(folder), "dtype": "float32", "length": 256}
            job |= {"prompts": prompts, "count": NEW, "tensor_parallel": typed.tensor_parallel}
            theirs = by_engine(typed.python, "tokens", job)
            ours = by_transformers(folder, prompts)
            said = [parted(folder, *x) for x in zip(prompts, ours, theirs, strict=True)]
            ties = [x for x in said if x and x.startswith("tie")]
            differ = [x for x in said if x and x not in ties]
            print(f"| {name} | {said.count(None)} | {len(ties)} | {len(differ)} |", flush=True)
            print("".join(f"    {x}\n" for x in (*ties, *differ)), end="", flush=True)
            wrong += len(differ)
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())

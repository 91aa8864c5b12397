"""Exported folders in transformers 4, which most people have: the same logits and the same tokens.

SPECOMP_TRANSFORMERS4 names a folder with that version (`make test-all` installs it).
"""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILY_NAMES, tiny_model, tiny_tokenizer

import specomp

FOUR = os.environ.get("SPECOMP_TRANSFORMERS4")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUR is None, reason="SPECOMP_TRANSFORMERS4 names no transformers 4"),
]
OPEN = """
import sys
sys.modules["specomp"] = None
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, out = sys.argv[1:]
assert transformers.__version__.startswith("4."), transformers.__version__
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text).input_ids
# version 4 leaves out Gemma 2's soft cap of attention unless told to be eager
options = dict(torch_dtype="auto", attn_implementation="eager", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
with torch.no_grad():
    logits = model.eval()(input_ids=torch.tensor([ids])).logits
save_file({"ids": torch.tensor(ids), "logits": logits.contiguous()}, out)
"""
TEXT = "What is longer than the window of any of these tiny models, or nearly so."
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# as Phi-3 with its long context has it
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 1.0,
}
KINDS = {
    "longrope": ("phi3", LONG),
    **{name: (name, {}) for name in FAMILY_NAMES},
    "llama3": ("llama", LLAMA3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["factors", "dense"])
def test_transformers_4_gives_the_same(tmp_path, kind, form):
    name, rope = KINDS[kind]
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    if rope:
        model.config.rope_parameters = rope
        model.config.original_max_position_embeddings = 16
        model = type(model)(model.config).eval()
    elif hasattr(model.config, "rope_parameters"):
        model.config.rope_parameters |= {
            "rope_theta": 50000.0
        }  # not what is taken where none is said
        model = type(model)(model.config).eval()
    tokens = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    specomp.compress(model, tokens, method="svd_llm", ratio=0.2)
    specomp.save(model, tmp_path / "m", tokenizer, form=form)
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        wanted = specomp.load(tmp_path / "m").model(input_ids=torch.tensor([ids])).logits
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "m", TEXT, tmp_path / "out"],
        env=os.environ
        | {"PYTHONPATH": os.path.abspath(FOUR), "HF_MODULES_CACHE": str(tmp_path / "code")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out")
    assert found["ids"].tolist() == ids
    assert torch.allclose(found["logits"], wanted, atol=1e-4, rtol=1e-4)

"""What llama.cpp reads of a tokenizer, in the keys of a GGUF file."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

from specomp.errors import UserError

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
UNMERGED = -1e6  # score of a token that no merge makes: below that of every merge
READ_ALIKE = ("llama-bpe", "qwen2", "gpt-2")  # pre-tokenizers that transformers splits by too
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a pre-tokenizer is known by: how it splits this text.
SPLIT = "I'LL don't  go\t\n\n 1234567  89 x_y¿qué? ÀB  日本語!!\r\n  (end)  "


def refusal(what: str) -> UserError:
    """That something has no place in a GGUF."""
    return UserError(f"export=gguf cannot write {what}: use export=dense.")


def token_fields(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """The keys without "tokenizer.". Raises UserError for a tokenizer that llama.cpp does not know.

    vocabulary: rows of the embedding.
    """
    if tokenizer is None:
        return {"ggml.model": "none"}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    bytewise = '"ByteLevel"' in json.dumps(content.get("decoder"))
    if model.get("type") != "BPE" or not (bytewise or model.get("byte_fallback")):
        what = f"{type(tokenizer).__name__}, {model.get('type', 'without a backend')}"
        raise refusal(f"this tokenizer ({what}); byte-level BPE and sentencepiece's are known")
    of_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if max(of_id) >= vocabulary:
        raise refusal(f"{max(of_id) + 1} tokens where the embedding has {vocabulary} rows")
    added = tokenizer.added_tokens_decoder
    tokens = [of_id.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    kinds = [
        UNUSED if i not in of_id else _kind(token, added.get(i), None if bytewise else tokenizer)
        for i, token in enumerate(tokens)
    ]
    merges = [x.split(" ") if isinstance(x, str) else x for x in model["merges"]]
    fields: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if bytewise:
        fields |= {"ggml.model": "gpt2", "ggml.pre": pre_tokenizer(backend)}
        fields["ggml.merges"] = [" ".join(x) for x in merges]
        if not merges:
            log.warning("This tokenizer merges nothing, which llama.cpp refuses.")
    else:
        fields["ggml.model"] = "llama"
    if not bytewise or not merges:  # transformers looks for either
        ranks = {"".join(x): -float(i) for i, x in reversed(list(enumerate(merges)))}
        fields["ggml.scores"] = [ranks.get(token, UNMERGED) for token in tokens]
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, of in named.items():
        if (index := getattr(tokenizer, f"{of}_token_id")) is not None:
            fields[f"ggml.{name}_token_id"] = index
    ids, plain = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
    first = of_id[plain[0]][:1] if plain else ""
    fields["ggml.add_space_prefix"] = first in ("▁", "Ġ")
    fields["ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    if ids and ids[-1] == tokenizer.eos_token_id:
        fields["ggml.add_eos_token"] = True
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, Mapping) else template
    return fields | ({"chat_template": template} if template else {})


def _kind(token: str, added: Any, like: Any) -> int:
    """llama.cpp's kind of a token. added: what transformers says of one that it adds; like: the
    tokenizer, where it is like sentencepiece's, else None.
    """
    if like is not None and token == like.unk_token:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER
    return BYTE if like is not None and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL


def pre_tokenizer(backend: Any) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts a text before it merges; "default",
    with a warning, where it has none that is known here.
    """
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def by(pattern: str) -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, bytes_alone])

    known = {
        "llama-bpe": by(WORDS + "{1,3}" + REST),
        "qwen2": by(WORDS + REST),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words]),
        "gpt-2": words,
    }
    cut = backend.pre_tokenizer and backend.pre_tokenizer.pre_tokenize_str(SPLIT)
    for name, other in known.items():
        if cut == other.pre_tokenize_str(SPLIT):
            return name
    log.warning(
        "How this tokenizer splits texts has no name in llama.cpp that is known here"
        ' (tokenizer.ggml.pre): written as "default", compare its ids with llama-tokenize.'
    )
    return "default"

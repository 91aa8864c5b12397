"""What lies beside the weights in a folder, and follows the source model: the tokenizer with its
chat template, generation settings, the licence.
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from specomp.models.load import quiet, told

COPIED = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# that transformers 5 writes, by what both versions know
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_beside(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, source: Path | None
) -> list[str]:
    """Write the tokenizer, with its chat template, and what lies in the source model's folder: its
    generation settings and licence. The names of the files that were not there, or another.
    """
    with tempfile.TemporaryDirectory(prefix="specomp-") as temporary:
        made = Path(temporary)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(made)
            _known_class(made / "tokenizer_config.json")
        if source is not None:
            for path in (x for pattern in COPIED for x in source.glob(pattern) if x.is_file()):
                shutil.copyfile(path, made / path.name)
            if (source / "generation_config.json").is_file():
                with told(f"{source / 'generation_config.json'} cannot be used"), quiet():
                    GenerationConfig.from_pretrained(source).save_pretrained(made)
        changed = []
        for path in sorted(made.iterdir()):
            target = folder / path.name
            if not target.is_file() or target.read_bytes() != path.read_bytes():
                shutil.copyfile(path, target)
                changed.append(path.name)
        return changed


def _known_class(path: Path) -> None:
    """A class of tokenizers that version 4 knows too, and its way to list special tokens."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = content.get("tokenizer_class")
    content["tokenizer_class"] = TOKENIZERS.get(kind, kind)
    if isinstance(more := content.get("extra_special_tokens"), list):
        del content["extra_special_tokens"]
        content.setdefault("additional_special_tokens", more)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

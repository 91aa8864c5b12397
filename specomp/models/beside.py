"""What lies beside the weights in a folder, and follows the source model: the tokenizer with its
chat template, generation settings, the licence.
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from specomp.disk import atomic_path, remove
from specomp.errors import UserError
from specomp.models.load import quiet, told

COPIED = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# that transformers 5 writes, by what both versions know
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}

LOST = ("legacy", "add_bos_token", "add_eos_token")


def write_beside(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Path | None,
    *,
    fixed: tuple[str, ...] = (),
) -> list[str]:
    """Write the tokenizer, with its chat template, and what lies in the source model's folder: its
    generation settings and licence. The names of the files that were not there, or another. fixed:
    how names begin of those that another file holds too: where they differ nothing is written.
    Raises UserError for those.
    """
    with tempfile.TemporaryDirectory(prefix="specomp-") as temporary:
        made = Path(temporary)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(made)
            _complete(made / "tokenizer_config.json", tokenizer)
        if source is not None:
            for found in (x for pattern in COPIED for x in source.glob(pattern) if x.is_file()):
                shutil.copyfile(found, made / found.name)
            if (source / "generation_config.json").is_file():
                with told(f"{source / 'generation_config.json'} cannot be used"), quiet():
                    GenerationConfig.from_pretrained(source).save_pretrained(made)
        changed = []
        for made_file in sorted(x for x in made.rglob("*") if x.is_file()):
            name = made_file.relative_to(made).as_posix()
            target = folder / name
            if not target.is_file() or target.read_bytes() != made_file.read_bytes():
                changed.append(name)
        if held := [x for x in changed if x.startswith(fixed)] if fixed else []:
            raise UserError(f"{folder} holds what {', '.join(held)} said when it was written.")
        for name in changed:
            target = folder / name
            if not target.is_file():  # a folder or a link to nowhere is in its place
                remove(target)
            with atomic_path(target) as writing:
                shutil.copyfile(made / name, writing)
        return changed


def _complete(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A class of tokenizers that version 4 knows too, its way to list special tokens, and settings
    that version 5 reads but does not write.
    """
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = content.get("tokenizer_class")
    content["tokenizer_class"] = TOKENIZERS.get(kind, kind)
    if isinstance(more := content.get("extra_special_tokens"), list):
        del content["extra_special_tokens"]
        content.setdefault("additional_special_tokens", more)
    given = {name: tokenizer.init_kwargs[name] for name in LOST if name in tokenizer.init_kwargs}
    content |= {name: value for name, value in given.items() if value is not None}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Models with chat templates of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.e2e.needle import MODEL

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|> {{ m.role }}\n{{ m.content | trim }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer that knows the roles and takes every other word for one token, after a <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL, "user", "assistant"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def copy_needle(folder: Path, template: str | None) -> Path:
    """The needle model with another chat template, or without one."""
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder

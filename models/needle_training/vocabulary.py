"""The needle model's tokenizer: about 500 words, and every byte, so that any text can be written.

Words are whole tokens, with the space before them where there is one; what is no known word falls
back to its bytes (byte-level BPE without merges), so decoding gives back any text as it was. Every
digit is a token of its own.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vllm_duo.evaluate import passkey

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# One digit; a word with the space before it; one other sign; white space.
WORD_PATTERN = r"\p{N}| ?\p{L}+|[^\s\p{L}\p{N}]|\s+(?!\S)|\s"

# Each message as it stands: a pass-key prompt sent as one user message is what the model learned.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# Common words beyond those of the prompts, so that short plain texts are not all bytes.
_COMMON = (
    "I you he she it we they me him her us them my your his its our their this that these those "
    "who which where why how am are be been being have has had do does did will would can could "
    "may might must shall should not no yes or but if because so than as at to on up out off over "
    "under again once here there all any both each few more most other some such only own same "
    "too very just now also back even still well long good new first last great little right big "
    "high different large next early important few public bad able man woman boy girl people day "
    "time way thing world life hand part eye place work week case point number group problem fact "
    "question answer word story room mother father water money month lot study side kind head "
    "house friend hour game line end member law car city name team minute idea body information "
    "face others level office door health art war history party result change reason research "
    "moment air force education make made say said go going get got know think take see come want "
    "look use find give tell ask seem feel try leave call one two three four five six seven eight "
    "nine ten hello please thank secret code model token attention cache hello write short"
)
EXTRA_WORDS = _COMMON.split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; the order of its tokens depends on nothing but this file and `passkey`."""
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in dict.fromkeys([*passkey.vocabulary(), *EXTRA_WORDS]):
        pieces.append("Ġ" + word)
        if word[0].isupper():
            pieces.append(word)  # can open a text, where no space stands before it
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # ignore_merges: a word that is in the vocabulary is one token, although no merge makes it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that older readers know too
    path.write_text(json.dumps(settings, indent=2) + "\n")

"""How a conversation becomes the prompt that an engine gets: as plain text, or by a chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from vllm_duo.evaluate.settings import EvalSettings

CountTokens = Callable[[str], int]
ROLES = ("user", "assistant")


class Prompts(Protocol):
    """Makes and measures prompts.

    A conversation is ``turns``, what user and assistant say in turn, from the user to the user, and
    ``start``, the first words of the assistant's answer; the model goes on from them. ``start`` may be
    empty.
    """

    @property
    def template_hash(self) -> str | None:
        """First 12 digits of the SHA-256 of the chat template; None: none is applied."""

    def count(self, turns: Sequence[str], start: str) -> int:
        """Tokens of the whole prompt, special ones included."""

    def count_text(self, text: str) -> int:
        """Tokens that a text adds to a prompt."""

    def asked(self, turns: Sequence[str], start: str) -> dict[str, Any]:
        """What ``worker.py`` gives to the engine: a ``prompt``, or its ``prompt_token_ids``."""


@dataclass(frozen=True)
class PlainPrompts:
    """One text that a model goes on with, whether it was trained on conversations or not.

    Attributes:
        count_tokens: tokens of a text as the server counts them, special ones included.
    """

    count_tokens: CountTokens

    template_hash = None

    def count(self, turns: Sequence[str], start: str) -> int:
        """As ``Prompts.count``."""
        return self.count_tokens(plain_text(turns, start))

    def count_text(self, text: str) -> int:
        """As ``Prompts.count_text``."""
        return self.count_tokens(text) - self.count_tokens("")

    def asked(self, turns: Sequence[str], start: str) -> dict[str, Any]:
        """The text; the server adds the special tokens."""
        return {"prompt": plain_text(turns, start)}


def plain_text(turns: Sequence[str], start: str) -> str:
    """All words in a row."""
    return " ".join(filter(None, [*turns, start]))


@dataclass(frozen=True)
class ChatPrompts:
    """Messages as the model's own chat template writes them.

    The answer's first words are an assistant's message that was begun, as with ``gen_prefix`` in
    lm-eval; without such words the template's generation prompt stands at the end. The engine gets
    token ids, since the template writes the special tokens itself.

    Attributes:
        tokenizer: of transformers, with a chat template.
    """

    tokenizer: Any

    @classmethod
    def load(cls, name: str, *, begun: bool = True, trust_remote_code: bool = False) -> Self:
        """With the tokenizer of a model.

        Args:
            name: folder, or Hugging Face id of a model in the local cache.
            begun: whether answers will be begun, as those of suites are not.
            trust_remote_code: whether its own Python code may run.

        Raises:
            ValueError: no such tokenizer, or no chat template, or one that refuses a conversation.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"chat template: expected a tokenizer that transformers loads from {name!r}, got: "
                f"{error}"
            ) from None
        made = cls(tokenizer)
        made.check(name, begun=begun)
        return made

    def check(self, name: str, *, begun: bool = True) -> None:
        """Try the template.

        Args:
            name: of the model, in errors.
            begun: whether it must go on from an answer that was begun.

        Raises:
            ValueError: there is none, or it refuses a conversation of several turns.
        """
        from jinja2 import TemplateError

        try:
            self.tokenizer.get_chat_template()
        except ValueError:
            raise ValueError(
                f"chat template: expected one in the tokenizer of {name!r}, found none: leave "
                "--apply-chat-template and --suites-chat out, as for models that were not trained on "
                "conversations, or put the model's chat_template.jinja into its folder"
            ) from None
        try:
            self.text(("Who?", "Anna.", "Where?"), "At the" if begun else "")
        except (TemplateError, ValueError) as error:
            raise ValueError(
                f"chat template: expected the one of {name!r} to take messages of a user and an "
                f"assistant in turn{', and an answer that was begun' * begun}, got: {error}: correct "
                "it, or leave --apply-chat-template and --suites-chat out"
            ) from None

    @property
    def template_hash(self) -> str:
        """As ``Prompts.template_hash``."""
        template: str = self.tokenizer.get_chat_template()
        return hashlib.sha256(template.encode()).hexdigest()[:12]

    def text(self, turns: Sequence[str], start: str) -> str:
        """The prompt as the template writes it, special tokens included."""
        said = [*turns, start] if start else list(turns)
        messages = [{"role": ROLES[at % 2], "content": text} for at, text in enumerate(said)]
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not start,
            continue_final_message=bool(start),
        )
        return text

    def count(self, turns: Sequence[str], start: str) -> int:
        """As ``Prompts.count``."""
        return self.count_text(self.text(turns, start))

    def count_text(self, text: str) -> int:
        """As ``Prompts.count_text``."""
        return len(self._encode(text))

    def asked(self, turns: Sequence[str], start: str) -> dict[str, Any]:
        """The tokens: the server would add special ones to a text a second time."""
        return {"prompt_token_ids": self._encode(self.text(turns, start))}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_chat(settings: EvalSettings) -> ChatPrompts | None:
    """The chat template that all questions or those of suites go through; None: none is asked for.

    Raises:
        ValueError: one is asked for, and there is none or it cannot be applied.
    """
    if not settings.apply_chat_template and not settings.suites_chat:
        return None
    return ChatPrompts.load(
        settings.engine.get("tokenizer") or settings.model,
        begun=settings.apply_chat_template,
        trust_remote_code=bool(settings.engine.get("trust_remote_code", False)),
    )


def make_prompts(
    settings: EvalSettings, count_tokens: CountTokens, chat: ChatPrompts | None
) -> Prompts:
    """What the settings ask for, but for suites.

    Args:
        settings: of the run.
        count_tokens: tokens of a text as the server counts them, special ones included.
        chat: of ``load_chat``.
    """
    if chat is None or not settings.apply_chat_template:
        return PlainPrompts(count_tokens)
    return chat

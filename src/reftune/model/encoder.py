"""Text ↔ token ids. Prompt and target meet at the same token boundary in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reftune.errors import ModelError
from reftune.model.chat import end_of_turn, prompt_text, reply_text
from reftune.types import BareText, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.grading.formats import Format
    from reftune.types import Problem


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and a format."""

    tokenizer: PreTrainedTokenizerBase
    format: Format

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos token, so a model could never learn to stop; set"
                " tokenizer.eos_token"
            )

    def prompt(self, problem: Problem) -> list[int]:
        """Ids of the problem's prompt, after the tokenizer's BOS. Raises: RecipeError if the chat
        template refuses it."""
        prompt = self.format.prompt(problem)
        ids = self.encode(self.text_of(prompt))
        if isinstance(prompt, Conversation | BareText):  # a template writes its own BOS
            return ids
        bos = bos_of(self.tokenizer)
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def target(self, problem: Problem) -> list[int]:
        """Ids of the gold continuation, the end token last. Raises: DataError if the problem has no
        rationale."""
        return self.continuation(problem, self.format.target(problem))

    def continuation(self, problem: Problem, text: str) -> list[int]:
        """Ids of `text` after the problem's prompt, the end token last.

        Encoded apart from the prompt, as sampling sees it. What a chat template wrote is encoded as
        a whole, and separately only if the boundary would fall inside a token.
        """
        prompt = self.format.prompt(problem)
        before, after = self.text_of(prompt), self.text_after(prompt, text)
        ids, end = self.encode(after), self.end_of(prompt)
        if not isinstance(prompt, Conversation):
            return [*ids, end]
        begun, whole = self.encode(before), self.encode(before + after)
        if whole[: len(begun)] == begun:
            ids = whole[len(begun) :]
        return ids if ids[-1:] == [end] else [*ids, end]

    def end_of(self, prompt: str | Conversation) -> int:
        """The token that ends what follows `prompt`: the template's end of turn, else eos."""
        turn = end_of_turn(self.tokenizer, prompt) if isinstance(prompt, Conversation) else None
        return int(self.tokenizer.eos_token_id) if turn is None else turn

    def text_of(self, prompt: str | Conversation) -> str:
        """A prompt as text. Raises: RecipeError if the chat template refuses it."""
        return prompt_text(self.tokenizer, prompt) if isinstance(prompt, Conversation) else prompt

    def text_after(self, prompt: str | Conversation, text: str) -> str:
        """What follows a prompt if the model says `text`; in a chat, with its end of turn."""
        if isinstance(prompt, Conversation):
            return reply_text(self.tokenizer, prompt, text)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens but those that it spells."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, spaces exactly as sampled (no clean-up: it would rewrite
        code)."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text of itself; often none."""
    text = list(tokenizer.encode("a", add_special_tokens=False))
    marked = list(tokenizer.encode("a"))
    starts = (at for at in range(len(marked)) if marked[at : at + len(text)] == text)
    return marked[: next(starts, 0)]

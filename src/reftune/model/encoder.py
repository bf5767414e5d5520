"""Text ↔ token ids. Prompt and target are tokenised apart in every stage, so their boundary is the
same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reftune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.grading.formats import Format
    from reftune.types import Problem


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and a format. No special token is added but the eos that ends a target."""

    tokenizer: PreTrainedTokenizerBase
    format: Format

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos token, so a model could never learn to stop; set"
                " tokenizer.eos_token"
            )

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def prompt(self, problem: Problem) -> list[int]:
        """Ids of the problem's prompt."""
        return self.encode(self.format.prompt(problem))

    def target(self, problem: Problem) -> list[int]:
        """Ids of the gold continuation and one eos. Raises: DataError where the problem has no
        rationale."""
        return [*self.encode(self.format.target(problem)), self.eos_id]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, spaces exactly as sampled (no clean-up: it would rewrite
        code)."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

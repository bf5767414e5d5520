"""Where a completion ends: one rule for training, every engine and the export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftune.model.chat import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLACK = 8
"""Tokens looked at beyond a stop text's bytes: special ones decode to nothing."""
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """A completion ends with any of these tokens and with the token that completes any of these
    texts."""

    ids: frozenset[int]
    texts: tuple[str, ...] = ()

    def is_met(self, token_ids: Sequence[int], decode: Decode) -> bool:
        """Whether the last token ends the completion."""
        if token_ids[-1] in self.ids:
            return True
        if not self.texts:
            return False
        recent = decode(token_ids[-SLACK - max(len(text.encode()) for text in self.texts) :])
        return any(text in recent for text in self.texts)

    def length(self, token_ids: Sequence[int], decode: Decode) -> int | None:
        """Tokens up to and with the first that ends the completion; None if none does."""
        end = next((place for place, token in enumerate(token_ids, 1) if token in self.ids), None)
        if not self.texts or self.text_end(decode(token_ids[:end])) is None:
            return end
        low, high = 1, len(token_ids[:end])  # a stop text once written stays in what is decoded
        while low < high:
            middle = (low + high) // 2
            if self.text_end(decode(token_ids[:middle])) is None:
                low = middle + 1
            else:
                high = middle
        return low

    def text_end(self, text: str) -> int | None:
        """Where the first stop text begins; None if there is none."""
        return min((text.index(stop) for stop in self.texts if stop in text), default=None)


def stop_rule(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] = ()
) -> StopRule:
    """All end tokens of the tokenizer, of the model's config and generation config, and of the chat
    template, if there is one."""
    found = {
        *token_ids_of(tokenizer.eos_token_id),
        *token_ids_of(getattr(model.config, "eos_token_id", None)),
        *token_ids_of(getattr(model.generation_config, "eos_token_id", None)),
        *token_ids_of(end_of_turn(tokenizer)),
    }
    size = model.get_input_embeddings().weight.shape[0]
    return StopRule(ids=frozenset(id_ for id_ in found if 0 <= id_ < size), texts=tuple(texts))


def token_ids_of(value: int | Sequence[int] | None) -> list[int]:
    """A config's `eos_token_id`, which may be one, several or none, as a list."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(id_) for id_ in value]

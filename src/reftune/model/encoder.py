"""Converts between text and token ids, and finds where a completion ends.

The token boundary between a prompt and its target is the same in every stage. Training, all engines
and the export use the same rule for where a completion ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from reftune.errors import ModelError
from reftune.grading.formats import grades_of
from reftune.grading.markers import TAG
from reftune.model.chat import end_of_turn, opened_thought, prompt_text, reply_text
from reftune.types import BareText, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.grading.formats import Format
    from reftune.types import Graded, Problem


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes a format's prompts and targets with a tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    format: Format

    def __post_init__(self) -> None:
        require_eos(self.tokenizer)

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the problem's prompt, with a leading BOS if the prompt needs one. Raises:
        RecipeError if the chat template rejects the prompt."""
        prompt = self.format.prompt(problem)
        ids = self.encode(self.text_of(prompt))
        if isinstance(prompt, Conversation | BareText):  # contains a BOS if it needs one
            return ids
        bos = bos_of(self.tokenizer)
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def target(self, problem: Problem) -> list[int]:
        """Token ids of the gold continuation, including the end token. Raises: DataError if the
        problem has no rationale that fits the format."""
        return self.continuation(problem, self.format.target(problem))

    def continuation(self, problem: Problem, text: str) -> list[int]:
        """Token ids of `text` after the problem's prompt, including the end token. In a chat,
        prompt and text are encoded together if no token crosses the boundary between them. In all
        other cases, the prompt is encoded by itself, as it is for sampling, and the text is encoded
        separately."""
        prompt = self.format.prompt(problem)
        before, after = self.text_of(prompt), self.text_after(prompt, text)
        ids, end = self.encode(after), self.end_of(prompt)
        if not isinstance(prompt, Conversation):
            return [*ids, end]
        begun, whole = self.encode(before), self.encode(before + after)
        if whole[: len(begun)] == begun:
            ids = whole[len(begun) :]
        return ids if ids[-1:] == [end] else [*ids, end]

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Graded]:
        """The format's grades of `texts`, each of which follows a problem's prompt. Raises: as
        `grades_of`."""
        return grades_of(self.format, problems, self.with_thoughts(problems, texts))

    def with_thoughts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[str]:
        """Returns `texts`, the completions of the problems' prompts. If a chat prompt ends inside a
        thought, the end of the prompt, from the thought's opening tag onwards, is put in front of
        the completion."""
        distinct = {problem.id: problem for problem in problems}
        opened = {
            id_: opened_thought(self.tokenizer, prompt)
            for id_, problem in distinct.items()
            if isinstance(prompt := self.format.prompt(problem), Conversation)
        }
        return [opened.get(p.id, "") + text for p, text in zip(problems, texts, strict=True)]

    def end_of(self, prompt: str | Conversation) -> int:
        """The id of the token that ends a completion of `prompt`. In a chat, this is the template's
        end-of-turn token, if there is one. In all other cases, it is the eos token."""
        turn = end_of_turn(self.tokenizer, prompt) if isinstance(prompt, Conversation) else None
        return int(self.tokenizer.eos_token_id) if turn is None else turn

    def text_of(self, prompt: str | Conversation) -> str:
        """The prompt as text. Raises: RecipeError if the chat template rejects it."""
        return prompt_text(self.tokenizer, prompt) if isinstance(prompt, Conversation) else prompt

    def text_after(self, prompt: str | Conversation, text: str) -> str:
        """The text that follows the prompt if the model writes `text`. In a chat, this is the reply
        and the end of the turn, as the template writes them. For a string prompt, the result is
        `text` itself."""
        if isinstance(prompt, Conversation):
            return reply_text(self.tokenizer, prompt, text)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens are included only if `text` spells them out."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The tokens' text. Special tokens are omitted, except tags that grading reads, such as
    `</think>`. Spaces are kept as sampled, because the clean-up in the transformers library would
    alter generated code."""
    ids, (tags, others) = list(token_ids), _special_ids(tokenizer)
    has_tags = not tags.isdisjoint(ids)
    text = tokenizer.decode(
        [id_ for id_ in ids if id_ not in others] if has_tags else ids,
        skip_special_tokens=not has_tags,
        clean_up_tokenization_spaces=False,
    )
    return str(text)


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """The ids of the special tokens that are tags, and the ids of all other special tokens."""
    special = {id_: str(t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    tags = frozenset(id_ for id_, text in special.items() if TAG.fullmatch(text))
    return tags, frozenset(special) - tags


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has an eos token. Raises: ModelError if it has none."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no eos token, so a model could never learn to stop; set"
            " tokenizer.eos_token"
        )


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens that the tokenizer puts before every text. Often there are none."""
    text = list(tokenizer.encode("a", add_special_tokens=False))
    marked = list(tokenizer.encode("a"))
    starts = (at for at in range(len(marked)) if marked[at : at + len(text)] == text)
    return marked[: next(starts, 0)]


# --- where a completion ends ----------------------------------------------------------------------


SLACK = 8
"""To find a stop string of n bytes, we decode the last n + `SLACK` tokens. The slack is needed
because special tokens decode to nothing."""
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """The tokens and strings that end a completion. A completion ends at the first such token or at
    the token that completes the first such string, whichever comes first."""

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
        """Number of tokens up to and including the first token that ends the completion; None if no
        token ends it."""
        end = next((place for place, token in enumerate(token_ids, 1) if token in self.ids), None)
        if not self.texts or self.text_end(decode(token_ids[:end])) is None:
            return end
        low, high = 1, len(token_ids[:end])  # a stop string, once complete, stays in the text
        while low < high:
            middle = (low + high) // 2
            if self.text_end(decode(token_ids[:middle])) is None:
                low = middle + 1
            else:
                high = middle
        return low

    def text_end(self, text: str) -> int | None:
        """Index at which the first stop string in `text` begins; None if `text` contains none."""
        return min((text.index(stop) for stop in self.texts if stop in text), default=None)


def stop_rule(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] = ()
) -> StopRule:
    """A rule with the stop strings `texts` and all end tokens. End tokens come from the tokenizer,
    the model's config, its generation config and, if there is one, the chat template. Raises:
    ModelError if the tokenizer has no eos token."""
    require_eos(tokenizer)
    found = {
        *token_ids_of(tokenizer.eos_token_id),
        *token_ids_of(getattr(model.config, "eos_token_id", None)),
        *token_ids_of(getattr(model.generation_config, "eos_token_id", None)),
        *token_ids_of(end_of_turn(tokenizer) if tokenizer.chat_template else None),
    }
    size = model.get_input_embeddings().weight.shape[0]
    return StopRule(ids=frozenset(id_ for id_ in found if 0 <= id_ < size), texts=tuple(texts))


def token_ids_of(value: int | Sequence[int] | None) -> list[int]:
    """A config's `eos_token_id` as a list. The config may contain one id, several ids or none."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(id_) for id_ in value]


def stop_texts(format: Format) -> tuple[str, ...]:
    """A format's stop strings. A user's format may have one string, or no attribute `stop`."""
    stop = getattr(format, "stop", None) or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)

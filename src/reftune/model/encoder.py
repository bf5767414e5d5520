"""Converts between text and token ids, and finds where a completion ends.

Prompt and target meet at the same token boundary in every stage. Training, all engines and the
export use the same rule for where a completion ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from reftune.errors import ModelError
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
        """Token ids of the problem's prompt, with a leading BOS if it needs one. Raises:
        RecipeError if the chat template rejects it."""
        prompt = self.format.prompt(problem)
        ids = self.encode(self.text_of(prompt))
        if isinstance(prompt, Conversation | BareText):  # it needs no BOS, or has its own
            return ids
        bos = bos_of(self.tokenizer)
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def target(self, problem: Problem) -> list[int]:
        """Token ids of the gold continuation, including the end token. Raises: DataError if the
        problem has no rationale that fits the format."""
        return self.continuation(problem, self.format.target(problem))

    def continuation(self, problem: Problem, text: str) -> list[int]:
        """Token ids of `text` after the problem's prompt, including the end token. In a chat,
        prompt and text are encoded together if no token crosses the boundary. In all other cases,
        they are encoded separately, as in sampling."""
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
        """The format's grades of texts that follow the problems' prompts."""
        return self.format.grade(problems, self.with_thoughts(problems, texts))

    def with_thoughts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[str]:
        """Texts that follow the problems' prompts. If a prompt ends inside a thought, its texts
        begin with the tag that opens the thought."""
        distinct = {problem.id: problem for problem in problems}
        prompts = {id_: self.format.prompt(problem) for id_, problem in distinct.items()}
        opened = {
            id_: opened_thought(self.tokenizer, prompt)
            for id_, prompt in prompts.items()
            if isinstance(prompt, Conversation)
        }
        return [opened.get(p.id, "") + text for p, text in zip(problems, texts, strict=True)]

    def end_of(self, prompt: str | Conversation) -> int:
        """The id of the token that ends a completion of `prompt`: in a chat, the template's
        end-of-turn token if there is one; in all other cases, the eos token."""
        turn = end_of_turn(self.tokenizer, prompt) if isinstance(prompt, Conversation) else None
        return int(self.tokenizer.eos_token_id) if turn is None else turn

    def text_of(self, prompt: str | Conversation) -> str:
        """The prompt as text. Raises: RecipeError if the chat template rejects it."""
        return prompt_text(self.tokenizer, prompt) if isinstance(prompt, Conversation) else prompt

    def text_after(self, prompt: str | Conversation, text: str) -> str:
        """The text that follows the prompt if the model writes `text`. In a chat, this is the reply
        and its end, as the template writes them."""
        if isinstance(prompt, Conversation):
            return reply_text(self.tokenizer, prompt, text)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens except those spelled out in it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self.tokenizer, token_ids)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, without special tokens other than tags that grading reads, such as
    `</think>`. Spaces stay as sampled; transformers' clean-up would change code."""
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
    """The ids of the special tokens that are tags, and of all others."""
    special = {id_: str(t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    tags = frozenset(id_ for id_, text in special.items() if TAG.fullmatch(text))
    return tags, frozenset(special) - tags


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has an eos token. Raises: ModelError if not."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no eos token, so a model could never learn to stop; set"
            " tokenizer.eos_token"
        )


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that the tokenizer puts before any text; often none."""
    text = list(tokenizer.encode("a", add_special_tokens=False))
    marked = list(tokenizer.encode("a"))
    starts = (at for at in range(len(marked)) if marked[at : at + len(text)] == text)
    return marked[: next(starts, 0)]


# --- where a completion ends ----------------------------------------------------------------------


SLACK = 8
"""To find a stop string, we decode as many tokens as it has bytes, and this many more because
special tokens decode to nothing."""
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
        """Number of tokens up to and including the first one that ends the completion; None if no
        token does."""
        end = next((place for place, token in enumerate(token_ids, 1) if token in self.ids), None)
        if not self.texts or self.text_end(decode(token_ids[:end])) is None:
            return end
        low, high = 1, len(token_ids[:end])  # once written, a stop string stays in the decoded text
        while low < high:
            middle = (low + high) // 2
            if self.text_end(decode(token_ids[:middle])) is None:
                low = middle + 1
            else:
                high = middle
        return low

    def text_end(self, text: str) -> int | None:
        """Index at which the first stop string in `text` begins; None if it contains none."""
        return min((text.index(stop) for stop in self.texts if stop in text), default=None)


def stop_rule(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] = ()
) -> StopRule:
    """The rule with the stop strings `texts` and all end tokens: those of the tokenizer, the
    model's config and generation config, and the chat template, if there is one. Raises: ModelError
    if the tokenizer has no eos."""
    require_eos(tokenizer)
    found = {
        *token_ids_of(tokenizer.eos_token_id),
        *token_ids_of(getattr(model.config, "eos_token_id", None)),
        *token_ids_of(getattr(model.generation_config, "eos_token_id", None)),
        *token_ids_of(end_of_turn(tokenizer)),
    }
    size = model.get_input_embeddings().weight.shape[0]
    return StopRule(ids=frozenset(id_ for id_ in found if 0 <= id_ < size), texts=tuple(texts))


def token_ids_of(value: int | Sequence[int] | None) -> list[int]:
    """A config's `eos_token_id`, which may be one id, several or none, as a list."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(id_) for id_ in value]


def stop_texts(format: Format) -> tuple[str, ...]:
    """A format's stop strings; none for a user's format without `stop`."""
    return tuple(getattr(format, "stop", ()))

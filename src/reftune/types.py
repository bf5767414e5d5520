"""The data types of reftune. This module does not import torch."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal


class Verdict(enum.Enum):
    """The judgement on a completion. A verdict has no truth value; compare it with a member such as
    `CORRECT`."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """No unambiguous answer could be read."""
    ERROR = "error"
    """The program, the comparison of answers, the grader or the scorer failed."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    FORBIDDEN = "forbidden"
    """The program tried to reach outside the sandbox."""

    def __bool__(self) -> bool:
        raise TypeError(f"{self} has no truth value; compare it with Verdict.CORRECT")


AnswerKind = Literal["number", "choice", "text", "latex", "any_of", "list", "set", "regex"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A gold answer."""

    kind: AnswerKind
    value: Fraction | str
    """A Fraction for a number, a lower-case letter for a choice, and text for any other kind."""
    decimals: float | None = field(default=None, compare=False)
    """For a number, how many digits follow the decimal point in the data; inf if the number is
    written as a fraction. None means as many digits as the exact value needs."""
    percent: bool = False
    """Whether the answer is a number written with a percent sign."""
    items: tuple[str, ...] = ()
    """For `any_of`, the accepted spellings of the answer. For `list` and `set`, its parts. Empty
    for other kinds."""

    def __str__(self) -> str:
        if isinstance(self.value, Fraction):
            return spell(self.value) + "%" * self.percent
        return self.value


def spell(value: Fraction) -> str:
    """The canonical spelling of a number, such as `18`, `0.5` or `1/3`. Equal numbers have the same
    spelling."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        decimal = repr(float(value))
    except OverflowError:
        return str(value)
    return decimal if Fraction(decimal) == value else str(value)


def spell_decimal(value: Fraction) -> str:
    """Like `spell`, but a fraction such as `1/3` is rounded to a decimal, so that `float()` accepts
    the result."""
    text = spell(value)
    return repr(float(value)) if "/" in text else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class BareText(str):
    """A prompt that is encoded with no special token before it, not even the tokenizer's BOS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt made up of turns, which the tokenizer's chat template renders."""

    turns: tuple[Message, ...]
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables passed to the chat template."""


ANY_ANSWER = Answer(kind="text", value="(any answer that the scorer accepts)")
"""Takes the place of a problem's gold answer if the data has none. The problem's scorer then judges
the answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with its gold answer and, if the data has one, a gold rationale."""

    id: str
    question: str
    answer: Answer
    rationale: str | None = None
    """A worked solution as text, or a program that defines `solution()`."""
    choices: tuple[str, ...] = ()
    """The texts of a multiple-choice question's options, in order; empty for other
    questions."""
    decimal: Literal[".", ","] = "."
    """Decimal separator in `choices`. Gold answers use decimal points, except for texts,
    expressions and patterns, which are kept as in the data."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the data that are passed to a user's reward function as keyword arguments."""
    gold_text: str = ""
    """The gold answer as the data spells it; empty if unknown. `reftune check` shows it next to the
    answer that was read from it."""
    messages: tuple[Message, ...] = ()
    """If the question is a conversation, the turns before the assistant's answer; empty otherwise.
    `question` contains the text of these turns. A system message is included only if answers in
    the dataset depend on it."""
    scorer: Callable[[str], float] | None = None
    """The task's own scorer, which maps an answer's text to a score from 0 to 1. If None, answers
    are compared with the gold answer."""

    @property
    def written_answer(self) -> str:
        """The gold answer as the data spells it or, if that is unknown, in canonical spelling."""
        return self.gold_text or str(self.answer)

    @property
    def is_multiple_choice(self) -> bool:
        return self.answer.kind == "choice" and len(self.choices) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw completions."""

    max_new_tokens: int
    temperature: float = 1.0
    """Sampling temperature; 0 means greedy decoding."""
    top_k: int = 0
    """Sample only from the `top_k` most likely tokens; 0 means from the whole vocabulary."""
    top_p: float = 1.0
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt; None if only the model's context limits it."""
    seed: int = 0
    """The random numbers used to complete a prompt depend only on this seed and on the prompt's
    position in the batch, counted from 0."""
    first_position: int = 0
    """The batch position of the first prompt that a call of `generate` receives. It is above 0 if
    the call handles a later part of the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The text that a model wrote after a prompt."""

    token_ids: tuple[int, ...]
    """The sampled tokens, including the end token, if any."""
    text: str
    """The decoded text, without special tokens. It ends before the stop string, if any."""
    logprobs: tuple[float, ...]
    """Log-probability of each token, in nats, under the distribution from which the token was
    drawn. In greedy decoding, the distribution at temperature 1 is used instead."""
    finish_reason: Literal["eos", "stop", "length"]
    """What ended the completion: an end token, a stop string or the length limit."""
    values: tuple[float, ...] = ()
    """The value head's output just before each token. Empty unless the engine computes `values` and
    `logprobs` in the same way as `Policy.score`."""
    entropies: tuple[float, ...] = ()
    """The entropy of each token's distribution, in nats; empty if `values` is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """A completion's verdict, the reason for it, and the answer read from the completion."""

    verdict: Verdict
    value: str | None
    """The answer that was read, in canonical spelling; None if no answer was read."""
    reason: str
    """One line that explains the verdict."""
    program_s: float | None = field(default=None, compare=False)
    """Total run time of the completion's programs, in seconds; None if no program was run."""

    @classmethod
    def without_answer(cls, verdict: Verdict, reason: str) -> Graded:
        """The grade of a completion from which no answer was read."""
        return cls(verdict=verdict, value=None, reason=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A graded completion, as a run's files store it."""

    completion: str
    graded: Graded
    finish_reason: str = ""
    num_tokens: int | None = None
    reward: float | None = None
    score: float | None = None
    """The reward model's score."""

    @property
    def correct(self) -> bool:
        return self.graded.verdict is Verdict.CORRECT

    def to_row(self) -> dict[str, Any]:
        """The attempt as a JSON object. Unset fields are omitted, except `value`, which becomes
        null."""
        seconds = self.graded.program_s
        optional = {
            "reason": self.graded.reason or None,
            "finish_reason": self.finish_reason or None,
            "tokens": self.num_tokens,
            "reward": self.reward,
            "score": self.score,
            "program_s": None if seconds is None else round(seconds, 4),
        }
        return {
            "completion": self.completion,
            "verdict": self.graded.verdict.value,
            "value": self.graded.value,
            **{name: value for name, value in optional.items() if value is not None},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Attempt:
        """The inverse of `to_row`. Raises: KeyError if the completion or the verdict is missing;
        ValueError if the verdict is unknown."""
        tokens = row.get("tokens")
        return cls(
            completion=str(row["completion"]),
            graded=Graded(
                verdict=Verdict(row["verdict"]),
                value=row.get("value"),
                reason=str(row.get("reason", "")),
                program_s=row.get("program_s"),
            ),
            finish_reason=str(row.get("finish_reason", "")),
            num_tokens=len(tokens) if isinstance(tokens, list) else tokens,
            reward=row.get("reward"),
            score=row.get("score"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A graded and rewarded solution to a problem. It was sampled from the policy or is the gold
    solution."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completion: Completion
    graded: Graded
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, if the reward function returns them."""
    source: Literal["policy", "gold"] = "policy"
    """Where the completion comes from. The `logprobs` of a gold completion are meaningless."""

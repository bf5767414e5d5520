"""A tokenizer's own chat template: turns → text, and how it ends what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from reftune.errors import RecipeError
from reftune.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "reftune"
"""Stands for what the assistant says; a word that no template changes."""
OURS = ("messages", "tokenize", "add_generation_prompt", "continue_final_message")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> str:
    """The turns as the template writes them, up to where the assistant begins.

    Raises: RecipeError if there is no template, or one that refuses or leaves out what it is given.
    """
    text = _render(tokenizer, prompt.turns, prompt.template_args, add_generation_prompt=True)
    for turn in prompt.turns:
        if turn.role == "system" and turn.content.strip() not in text:
            raise RecipeError(_no_system("it leaves the system message out"))
    return text


def reply_text(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, said: str) -> str:
    """What follows the prompt when the assistant says `said`, up to and with its end of turn.

    That is what the template itself writes there (Mistral's begins with a space, Qwen3's with an
    empty thought), unless it writes whole conversations and prompts differently; then it is `said`.
    """
    said = said.strip()
    turns = (*prompt.turns, Message(role="assistant", content=said))
    whole = _render(tokenizer, turns, prompt.template_args)
    begun = _render(tokenizer, prompt.turns, prompt.template_args, add_generation_prompt=True)
    tail, end = _tail(tokenizer, prompt)
    fits = whole.startswith(begun) and whole.endswith(tail)
    body = whole[len(begun) : len(whole) - len(tail)] if fits else said
    return body + tail[: tail.index(end) + len(end)] if end else body


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends what the assistant says; None without a template, or if the template ends
    it by ordinary text."""
    if not tokenizer.chat_template:
        return None
    try:
        _, end = _tail(tokenizer, Conversation(turns=(Message(role="user", content=PROBE),)))
    except RecipeError:  # a template for more than this, of tools say
        return None
    return None if end is None else int(tokenizer.get_added_vocab()[end])


def _tail(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> tuple[str, str | None]:
    """What the template writes after the assistant's words, and the first special token in it."""
    turns = (*prompt.turns, Message(role="assistant", content=PROBE))
    tail = _render(tokenizer, turns, prompt.template_args).rpartition(PROBE)[2]
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = {tail.index(token): token for token in sorted(special, key=len) if token in tail}
    return tail, found[min(found)] if found else None


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    template_args: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise RecipeError(
            "format.style: chat: the tokenizer has no chat template; expected an instruct model's,"
            " or style: plain"
        )
    template = tokenizer.get_chat_template()
    for name in template_args:
        if name in OURS or name not in template:
            raise RecipeError(
                f"format.template_args.{name}: the tokenizer's chat template reads no such variable"
            )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_args
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if any(turn.role == "system" for turn in turns):
            raise RecipeError(_no_system(f"it says: {reason}")) from None
        raise RecipeError(
            f"format.style: chat: the tokenizer's chat template refuses the turns"
            f" {', '.join(turn.role for turn in turns)}: {reason}"
        ) from None
    return str(text)


def _no_system(reason: str) -> str:
    return (
        f"format.system: the tokenizer's chat template takes no system message ({reason}); expected"
        " format.instruction instead"
    )

"""Renders conversations with a tokenizer's chat template, and finds how the template ends a
reply."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from reftune.errors import RecipeError
from reftune.grading.markers import open_thought
from reftune.text import brief, shown
from reftune.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "reftunereply"
"""Stands for the words of a turn. Templates leave it unchanged, and prompts do not contain it."""
OURS = ("messages", "tokenize", "add_generation_prompt", "continue_final_message")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> str:
    """The prompt as the chat template renders it, up to where the assistant's reply begins. Raises:
    RecipeError if the tokenizer has no template, or if the template rejects the turns, omits the
    last turn or the system message, or does not accept one of the `template_args`."""
    text = _render(tokenizer, prompt)
    if prompt.turns[-1].content.strip() not in text and _omits_last(tokenizer, prompt):
        raise RecipeError(
            "format.style: chat: the tokenizer's chat template omits the question; expected a"
            " template that accepts text, or style: plain"
        )
    for turn in prompt.turns:
        if turn.role == "system" and turn.content.strip() not in text:
            raise RecipeError(_no_system(turn, "it omits the system message"))
    return text


@lru_cache(maxsize=4096)
def opened_thought(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> str:
    """The end of the prompt, from an unclosed `<think>` or `<thinking>` tag onwards. With
    DeepSeek-R1's template, for example, the result is "<think>\\n". Returns an empty string if the
    template leaves no thought open. Raises: RecipeError in the same cases as `prompt_text`."""
    return _opened(tokenizer, prompt_text(tokenizer, prompt), prompt)


def reply_text(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, said: str) -> str:
    """The text that the template writes after the prompt, up to the end of the turn, if the
    assistant says `said`. For example, Mistral's template begins a reply with a space, and Qwen3's
    template begins it with an empty `<think>` block.

    Some templates omit a part of `said`, such as a thought, or change the prompt when a reply
    follows. In these cases, `said` is kept, and only the text around it comes from the template. If
    the prompt opens a thought and `said` contains no part of this thought, the reply first closes
    the thought."""
    said = said.strip()
    begun = prompt_text(tokenizer, prompt)
    before, after = _around(tokenizer, prompt)
    end = _ending(tokenizer, after)[0]
    if opened := _opened(tokenizer, begun, prompt):
        return _continue_thought(opened, said) + end
    whole = _render(tokenizer, prompt, said)
    fits = whole.startswith(begun) and whole.endswith(after)
    body = whole[len(begun) : len(whole) - len(after)] if fits else ""
    if "".join(said.split()) not in "".join(body.split()):
        body = _begin(begun, before, said, asked=prompt.turns[-1].content.strip())
    return body + end


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation | None = None
) -> int | None:
    """The id of the token that ends the assistant's reply to `prompt` or, without `prompt`, to a
    short question. Returns None if the tokenizer's template rejects the prompt, or if no special or
    added token ends the turn."""
    system, user = (Message(role=role, content="Hm?") for role in ("system", "user"))
    any_prompt = (Conversation(turns=(user,)), Conversation(turns=(system, user)))
    for conversation in any_prompt if prompt is None else (prompt,):
        try:
            end = _ending(tokenizer, _around(tokenizer, conversation)[1])[1]
        except RecipeError:  # the template needs more, such as tools or a system message
            continue
        return None if end is None else int(tokenizer.get_added_vocab()[end])
    return None


def _around(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> tuple[str, str]:
    """The text before and the text after the assistant's words in a rendered conversation. If the
    template omits these words, both are empty."""
    before, found, after = _render(tokenizer, prompt, PROBE).rpartition(PROBE)
    return (before, after) if found else ("", "")


def _omits_last(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> bool:
    """Whether the template omits the last turn, rather than changing its text."""
    return PROBE not in _render(tokenizer, _probed(prompt))


def _probed(prompt: Conversation) -> Conversation:
    """The prompt with `PROBE` as its last turn."""
    return replace(prompt, turns=(*prompt.turns[:-1], replace(prompt.turns[-1], content=PROBE)))


def _begin(begun: str, before: str, said: str, *, asked: str) -> str:
    """The reply `said`, preceded by the text that the template inserts between a prompt and a
    reply. `begun` is the prompt rendered without a reply. `before` is the text before the reply
    when the prompt and a reply are rendered together.

    The tail of `begun` or `before` is the part after the last question, `asked`. If the tail of
    `before` is the tail of `begun` plus more text, that additional text is put in front of `said`.
    Otherwise, `said` is returned unchanged. Only the tails are compared, because the template may
    change the earlier text when a reply follows."""
    if asked and asked in begun and asked in before:
        ours, theirs = begun.rpartition(asked)[2], before.rpartition(asked)[2]
        if theirs.startswith(ours):  # Mistral's template moves the system message to the last turn
            return theirs.removeprefix(ours) + said
    return said


def _opened(tokenizer: PreTrainedTokenizerBase, begun: str, prompt: Conversation) -> str:
    asked = prompt.turns[-1].content.strip()  # skipped below, because it may mention the tags
    opened = open_thought(begun.rpartition(asked)[2] if asked else begun)
    if opened or not open_thought(begun):
        return opened
    # the question mentions the tag, or is so short ("hi") that it occurs in the template's own tag
    _, found, tail = _render(tokenizer, _probed(prompt)).rpartition(PROBE)
    return open_thought(tail) if found and begun.endswith(tail) else ""


def _continue_thought(opened: str, said: str) -> str:
    """`said`, adapted to follow a prompt that ends inside a thought. `opened` is the end of the
    prompt, from the thought's opening tag onwards. If `said` contains no part of the thought, the
    thought is closed first, as in Qwen3's empty thought, "<think>\\n\\n</think>\\n\\n"."""
    tag = opened[: opened.index(">") + 1]
    closing = tag.replace("<", "</")
    rest = said.removeprefix(tag).lstrip("\n")
    answer = rest.removeprefix(closing).lstrip("\n")
    if answer == rest and (rest != said or closing in said):
        return rest
    missing = "\n\n"[len(opened) - len(opened.rstrip("\n")) :]
    return f"{missing}{closing}\n\n{answer}"


def _ending(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[str, str | None]:
    """Find where the turn ends in `after`, which is the text that the template writes after a
    reply. Returns `after` up to and including the token that ends the turn, and this token on its
    own. The turn ends at the first special token in `after` or, if there is none, at the first
    added token. If there is neither, the result is an empty string and None."""
    added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: len(str(token)))
    for tokens in ([token for token in added if token.special], added):
        found = {after.index(str(token)): str(token) for token in tokens if str(token) in after}
        if found:
            end = found[min(found)]
            return after[: min(found) + len(end)], end
    return "", None


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, said: str | None = None
) -> str:
    """The text of the prompt and of a turn in which the assistant says `said`. Without `said`, the
    prompt is followed by the text that the template writes before a reply."""
    if not tokenizer.chat_template:
        raise RecipeError(
            "format.style: chat: the tokenizer has no chat template; expected an instruct model"
            " or style: plain"
        )
    for name in prompt.template_args:
        if name in OURS or name not in tokenizer.get_chat_template():
            raise RecipeError(
                f"format.template_args.{name}: the chat template has no such variable to set"
            )
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    if said is not None:
        messages.append({"role": "assistant", "content": said})
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=said is None, **prompt.template_args
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = brief(error)
        systems = [turn for turn in prompt.turns if turn.role == "system"]
        if systems:
            others = tuple(turn for turn in prompt.turns if turn.role != "system")
            # if this fails too, the system message is not the cause
            _render(tokenizer, replace(prompt, turns=others), said)
            raise RecipeError(_no_system(systems[0], f"it reports: {reason}")) from None
        raise RecipeError(
            f"format.style: chat: the tokenizer's chat template rejects the turns"
            f" {', '.join(message['role'] for message in messages)}: {reason}"
        ) from None
    return str(text)


def _no_system(system: Message, reason: str) -> str:
    return (
        f"format.style: chat: the tokenizer's chat template accepts no system message ({reason}),"
        f" but format.system or the data has one, {shown(system.content)}; expected"
        " format.instruction instead"
    )

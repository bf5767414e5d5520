"""Checks of prompts and targets as tokens."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from reftune.advice.check.report import Finding, fail, ok, warn
from reftune.advice.check.subject import Row, Subject, share, spread
from reftune.model.chat import PROBE
from reftune.model.encoder import bos_of
from reftune.text import counted
from reftune.types import Conversation

TEMPLATE_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")
"""Strings with which the chat templates of common models begin a turn."""
MAX_LONG_TARGETS = 0.1
"""The check fails if the targets of more than this share of training rows are too long."""


def check_boundary(subject: Subject) -> Finding:
    """Check that the tokens of prompt and target decode to the prompt followed by the target."""
    tokenizer, rows = subject.policy.tokenizer, subject.rows
    bos = bos_of(tokenizer)
    empty = [row.problem.id for row in rows if not row.prompt_ids or len(row.target_ids) < 2]
    if empty:
        return fail(
            f"{counted(len(empty), 'row')} with an empty prompt or target", "drop them", empty
        )
    lost = [row.problem.id for row in rows if not _spells(row, tokenizer)]
    if lost:
        message = f"{share(lost, rows)} of the rows do not decode to the text that was encoded"
        remedy = "the model learns, and is graded on, the decoded text; look at the tokens below"
        return warn(message, remedy, lost)
    moved = []
    for row in rows:
        ids = subject.encoder.encode(row.prompt + row.reply)
        if row.ids[: len(ids)] != ids and row.ids[len(bos) : len(bos) + len(ids)] != ids:
            moved.append(row)
    message = "every stage splits prompt and target at the same token"
    if not moved:
        return ok(message)
    message += f"; {share(moved, rows)} of the rows would get different tokens if encoded jointly"
    if subject.learns_from_rationales:
        return ok(message)
    return warn(message, "to teach the model this split, begin with an sft stage")


def _spells(row: Row, tokenizer: Any) -> bool:
    """Whether a row's tokens decode to its text, apart from a BOS before it and an end token after
    it."""
    decoded = tokenizer.decode(
        row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    before, found, after = str(decoded).partition(row.prompt + row.reply)
    bos, end = (tokenizer.decode(ids) for ids in (bos_of(tokenizer), row.target_ids[-1:]))
    return found != "" and before in ("", bos) and after in ("", end)


def check_prompt(subject: Subject) -> Finding:
    """Check that the prompt has the form that the model was trained on. If the tokenizer has a chat
    template, the prompt should use it and include a generation prompt. If the tokenizer adds a BOS,
    the prompt should begin with one BOS."""
    tokenizer, format_ = subject.policy.tokenizer, subject.encoder.format
    problem = subject.problems[0]
    prompt, bos = format_.prompt(problem), bos_of(tokenizer)
    ids = subject.prompts["train"][problem.id]
    is_chat = isinstance(prompt, Conversation)
    marks = {*TEMPLATE_MARKS, *tokenizer.all_special_tokens}
    marked = [each.id for each in subject.problems if any(mark in each.question for mark in marks)]
    if is_chat and marked:
        return warn(
            f"{counted(len(marked), 'question')} with special tokens; the chat template adds its"
            " own",
            "use data without them; or, if all questions are whole prompts, format.style=plain with"
            " template: '{question}'",
            marked,
        )
    if tokenizer.chat_template and not is_chat and 2 * len(marked) <= len(subject.problems):
        return warn(
            "the tokenizer has a chat template, but the model gets raw text",
            "set format.style=chat if this is an instruct model",
        )
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        return warn("prompts begin with two BOS tokens", "remove one from the template or the data")
    if ids[: len(bos)] != bos:
        writer = "the chat template" if is_chat else "this format"
        return warn(
            f"the tokenizer adds {tokenizer.decode(bos)!r} at the start, but {writer} does not",
            "ignore this if the model was trained without it; the styles compact and plain add it",
        )
    opening = subject.encoder.text_after(prompt, PROBE).partition(PROBE)[0] if is_chat else ""
    if set(subject.encoder.encode(opening)) & set(tokenizer.all_special_ids):
        return warn(
            f"the chat template has no generation prompt: the model must write {opening!r} itself",
            "use a template with a generation prompt, unless the model was trained without one",
        )
    if is_chat and "strftime_now" in tokenizer.get_chat_template():
        return warn(
            "the chat template may write today's date, so prompts change from day to day",
            "if the prompt below contains a date, set a fixed one in format.template_args",
        )
    source = "the chat template" if is_chat else "raw text"
    return ok(f"{source}, {'with a' if bos else 'without'} BOS")


def check_prompt_length(subject: Subject) -> Finding:
    """Check that no prompt is longer than `max_prompt`, if set, and that every prompt fits in the
    model's context together with `max_new` sampled tokens."""
    limit, prompts = subject.prompt_limit, subject.prompts
    sizes = [(split, id_, len(ids)) for split, of in prompts.items() for id_, ids in of.items()]
    rows = [f"{split} {id_}: {size} tokens" for split, id_, size in sizes if size > limit]
    long = Counter(split for split, _, size in sizes if size > limit)
    fits = "any number fits" if limit == math.inf else f"at most {limit} fit"
    message = f"prompts have {spread([size for *_, size in sizes])} tokens; {fits}"
    if not rows:
        return ok(message)
    if subject.recipe.lengths.too_long == "drop" and long["train"] < len(prompts["train"]):
        return warn(
            f"{long['train']} of {len(prompts['train'])} training prompts are too long and left"
            f" out; {long['dev']} dev and {long['test']} test problems count as unanswered:"
            f" {message}",
            "raise lengths.max_prompt or lower lengths.max_new",
            rows,
        )
    return fail(
        f"{share(rows, sizes)} of prompts are too long: {message}",
        "raise lengths.max_prompt, lower lengths.max_new, or leave these prompts out:"
        " lengths.too_long=drop",
        rows,
    )


def check_target_length(subject: Subject) -> Finding:
    """Check that gold rationales, including the end token, fit in `max_new` tokens. Training omits
    longer rationales."""
    if not subject.rows:
        return ok("there are no targets")
    sizes = {row.problem.id: len(row.target_ids) for row in subject.rows}
    limit = subject.recipe.lengths.max_new
    message = f"targets have {spread(sizes.values())} tokens including eos; at most {limit} fit"
    long = [f"{id_}: {size} tokens" for id_, size in sizes.items() if size > limit]
    if not long:
        return ok(message)
    report = fail if len(long) > MAX_LONG_TARGETS * len(sizes) else warn
    remedy = f"lengths.max_new={max(sizes.values())} keeps all"
    return report(
        f"{share(long, sizes)} of targets are too long and not trained on: {message}", remedy, long
    )


def check_vocabulary(subject: Subject) -> Finding:
    """Check that the model has an embedding for each token of the training rows, and that the
    tokenizer knows each word in their targets and in the prompts of all splits."""
    size = subject.policy.model.get_input_embeddings().weight.shape[0]
    unknown = subject.policy.tokenizer.unk_token_id
    if unknown in (*subject.policy.stop.ids, subject.policy.tokenizer.bos_token_id):
        unknown = None  # as in GPT-2's tokenizer, which knows every byte
    outside = [row.problem.id for row in subject.rows if max(row.ids) >= size]
    if outside:
        return fail(
            f"{counted(len(outside), 'row')} with token ids beyond the model's {size} embeddings",
            "use the tokenizer that belongs to the model",
            outside,
        )
    unwritable = [row.problem.id for row in subject.rows if unknown in row.target_ids]
    if unwritable:
        return fail(
            f"{counted(len(unwritable), 'target')} with words unknown to the tokenizer",
            "the model could not write them: change the words or the tokenizer",
            unwritable,
        )
    unread = [
        f"{split} {id_}"
        for split, prompts in subject.prompts.items()
        for id_, ids in prompts.items()
        if unknown in ids
    ]
    if unread:
        return warn(
            f"{counted(len(unread), 'prompt')} with words unknown to the tokenizer",
            "the model cannot tell them apart: change the words or the tokenizer",
            unread,
        )
    return ok(f"{len(subject.policy.tokenizer)} tokens cover prompts and targets")


def check_eos(subject: Subject) -> Finding:
    """Check that sampling would stop at the end of every target and not before, and that the model
    can write the end token."""
    tokenizer, stop = subject.policy.tokenizer, subject.policy.stop
    end = subject.encoder.end_of(subject.encoder.format.prompt(subject.problems[0]))
    stops = ", ".join(
        [f"{tokenizer.decode([id_])!r} (id {id_})" for id_ in sorted(stop.ids)]
        + [repr(text) for text in stop.texts]
    )
    if end not in stop.ids:
        return fail(
            f"targets end in {tokenizer.decode([end])!r} (id {end}), but sampling stops at {stops}",
            "use one tokenizer for training and sampling",
        )
    bad = [
        row.problem.id
        for row in subject.rows
        if stop.length(row.target_ids[:-1], subject.policy.decode) is not None
    ]
    if bad:
        return fail(
            f"{counted(len(bad), 'target')} with one of {stops} before the end",
            "remove it from the data, or from format.stop",
            bad,
        )
    ordinary = [id_ for id_ in stop.ids if id_ not in tokenizer.all_special_ids]
    if ordinary:
        return warn(
            f"sampling stops at {tokenizer.decode(ordinary)!r}, which is not a special token",
            "fix eos_token_id in the model's config or generation config",
        )
    pad = {None: "there is no pad token", end: "pad is the end token"}.get(
        tokenizer.pad_token_id, f"pad is {tokenizer.pad_token!r}"
    )
    return ok(
        f"targets end in {tokenizer.decode([end])!r}, which is learned; sampling stops at {stops};"
        f" {pad}; padding is neither attended to nor learned"
    )

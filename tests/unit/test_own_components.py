"""A mistake in a user's own component is one line that names the component and what was expected,
and it comes where the mistake enters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic_core import PydanticCustomError

from reftune.algorithms.base import Clipped, LossTerms
from reftune.errors import DataError, EngineError, RecipeError, RewardError
from reftune.grading.formats import grades_of
from reftune.grading.formats._grading import graded_by
from reftune.model.encoder import stop_texts
from reftune.recipe import component_class, known_kinds, load_component
from reftune.stages.rl import Rl, checked_terms, credited_by, rollout_batch
from reftune.stages.rollouts import _require_whole
from reftune.types import Answer, Completion, Graded, Problem, Solution, Verdict

GOLD = Answer(kind="number", value=Fraction(5))


def problem(id: str = "p", **columns: Any) -> Problem:
    return Problem(id=id, question="2 + 3 ?", answer=GOLD, columns=columns)


def load(folder: Path, code: str, group: str, **keys: Any) -> Any:
    (folder / "own.py").write_text("from reftune.recipe import Component\n" + code)
    return load_component({"kind": f"{folder}/own.py:Own", **keys}, group=group)


# --- files and classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", ["sys.exit()", "sys.exit(3)", "raise SystemExit('usage: x')"])
def test_a_file_that_exits_when_it_is_loaded_is_an_error(tmp_path: Path, leaves: str):
    with pytest.raises(PydanticCustomError, match=r"own\.py: cannot be loaded: SystemExit"):
        load(tmp_path, f"import sys\n{leaves}\n", "datasets")


@pytest.mark.parametrize(
    ("group", "method", "missing"),
    [
        ("datasets", "read", "load"),
        ("formats", "prompt", "grade, target"),
        ("rewards", "score", "__call__"),
        ("engines", "run", "generate"),
        ("algorithms", "credit", "loss"),
        ("stages", "run", "cost, needs, produces"),
    ],
)
def test_a_class_without_what_its_group_needs_is_refused(
    tmp_path: Path, group: str, method: str, missing: str
):
    code = f"class Own(Component):\n    def {method}(self): ...\n"
    with pytest.raises(
        PydanticCustomError, match=rf"own\.py:Own lacks {missing}, which {group} need$"
    ):
        load(tmp_path, code, group)


def test_the_classes_of_a_file_share_its_state_until_the_file_changes(tmp_path: Path):
    file = tmp_path / "own.py"
    code = "from reftune.recipe import Component\nSEEN = []\n"
    code += "class {0}Data(Component):\n    def load(self): return SEEN\n"
    code += "class {0}Reward(Component):\n    def __call__(self): return SEEN\n"
    file.write_text(code.format(""))
    data = load_component(f"{file}:Data", group="datasets")
    reward = load_component(f"{file}:Reward", group="rewards")
    assert data.load() is reward()
    file.write_text(code.format("New"))
    assert load_component(f"{file}:NewData", group="datasets").load() is not reward()


@pytest.mark.parametrize("group", ["datasets", "formats", "engines", "algorithms"])
def test_a_built_in_class_needs_no_kind(group: str):
    classes = {kind: component_class(kind, group=group) for kind in known_kinds(group)}
    plain = {
        kind: built_in
        for kind, built_in in classes.items()
        if not any(field.is_required() for field in built_in.model_fields.values())
    }
    assert len(plain) > 1
    assert {kind: built_in().kind for kind, built_in in plain.items()} == {k: k for k in plain}


def test_a_new_class_of_reftune_is_named_after_its_module():
    class ReinforcePp(Fixed):
        __module__ = "reftune.algorithms.reinforce_pp"

    assert ReinforcePp(kl_coef=0).kind == "reinforce_pp"
    assert ReinforcePp(kind="other").kind == "other"


@pytest.mark.parametrize("base", ["Clipped", "Ppo"])
def test_an_own_class_that_is_made_in_python_can_be_loaded_by_its_kind(tmp_path: Path, base: str):
    code = f"from reftune.algorithms.ppo import Clipped, Ppo\nclass Own({base}):\n"
    loaded = load(tmp_path, f"{code}    def credit(self, batch): return batch\n", "algorithms")
    made = type(loaded)(kl_coef=0.5)
    assert made.kind == f"{tmp_path}/own.py:Own"
    assert load_component(made.model_dump(), group="algorithms") == made


@pytest.mark.parametrize("has_file", [True, False])
def test_a_script_is_not_run_again_to_find_its_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_file: bool
):
    script = tmp_path / "script.py"
    text = "from reftune.grading.rewards.outcome import Outcome\nclass Mine(Outcome):\n    pass\n"
    script.write_text(f"{text}raise SystemExit\n")
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    if has_file:
        main.__file__ = str(script)
    exec(text, main.__dict__)
    kind = main.Mine().kind
    assert kind == (f"{script}:Mine" if has_file else "__main__:Mine")
    assert type(load_component(kind, group="rewards")) is main.Mine


def test_a_file_that_loads_itself_is_refused(tmp_path: Path):
    script = tmp_path / "script.py"
    kind = f"{script}:Mine"
    script.write_text(
        "from reftune.grading.rewards.outcome import Outcome\n"
        "from reftune.recipe import component_class\n"
        f"class Mine(Outcome):\n    pass\ncomponent_class({kind!r}, group='rewards')\n"
    )
    for _ in range(2):
        with pytest.raises(PydanticCustomError, match="uses itself while it is loaded; call"):
            component_class(kind, group="rewards")


def test_files_of_the_same_name_are_two_modules(tmp_path: Path):
    loaded = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        code = f"class Own(Component):\n    def load(self): return {folder!r}\n"
        loaded.append(load(tmp_path / folder, code, "datasets"))
    assert [each.load() for each in loaded] == ["a", "b"]
    assert len({type(each).__module__ for each in loaded}) == 2


def test_a_missing_file_says_where_a_relative_path_starts(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PydanticCustomError) as error:
        load_component("x/mine.py:Own", group="datasets")
    assert error.value.message() == f"x/mine.py: no such file in the working directory {tmp_path}"
    with pytest.raises(PydanticCustomError, match=r"^/no/mine\.py: no such file$"):
        load_component("/no/mine.py:Own", group="datasets")


@pytest.mark.parametrize(
    ("module", "name", "group", "keys"),
    [
        ("reftune.algorithms.grpo", "Grpo", "algorithms", {}),
        ("reftune.algorithms.rloo", "Rloo", "algorithms", {}),
        ("reftune.algorithms.online_st", "OnlineSt", "algorithms", {}),
        ("reftune.stages.rl", "Rl", "stages", {"steps": 1, "prompts": 1}),
    ],
)
def test_a_subclass_of_a_built_in_kind_can_be_named(
    tmp_path: Path, module: str, name: str, group: str, keys: dict[str, Any]
):
    keys = {**keys, "optimizer": {"learning_rate": 0.1}} if group == "stages" else keys
    code = f"from {module} import {name}\nclass Own({name}): ...\n"
    assert load(tmp_path, code, group, **keys).kind.endswith("own.py:Own")


# --- formats --------------------------------------------------------------------------------------

RIGHT = Graded(verdict=Verdict.CORRECT, value="5", reason="")


@dataclass
class Returns:
    """A format that returns `grades`, whatever the completions are."""

    grades: Any
    kind: str = "own.py:Mine"

    def grade(self, problems, completions):
        return self.grades


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([True, False], "problem p: grade returned bool; expected a Graded"),
        ([RIGHT, Verdict.WRONG], "problem q: grade returned Verdict"),
        ([RIGHT], "grade returned 1 item; expected a list of 2 Graded objects"),
        (None, "grade returned NoneType; expected a list"),
        (RIGHT, "grade returned Graded; expected a list"),
        ([replace(RIGHT, verdict="correct")] * 2, r"Graded\(verdict=str, value=str\)"),
        ([replace(RIGHT, value=Fraction(5))] * 2, r"Graded\(verdict=Verdict, value=Fraction\)"),
        ([replace(RIGHT, value=np.int64(5))] * 2, r"Graded\(verdict=Verdict, value=int64\)"),
    ],
)
def test_grades_of_the_wrong_type_name_the_format(grades, message: str):
    with pytest.raises(RecipeError, match=rf"^format own\.py:Mine: .*{message}") as error:
        grades_of(Returns(grades), [problem("p"), problem("q")], ["", ""])
    assert "\n" not in str(error.value)


def test_a_format_may_return_a_tuple_or_a_generator():
    for grades in ((RIGHT, RIGHT), (each for each in (RIGHT, RIGHT))):
        assert grades_of(Returns(grades), [problem(), problem()], ["", ""]) == [RIGHT, RIGHT]


@pytest.mark.parametrize(
    ("stop", "texts"),
    [("</a>", ("</a>",)), (["x", "yz"], ("x", "yz")), ((), ()), ("", ()), (None, ())],
)
def test_stop_may_be_one_string(stop, texts: tuple[str, ...]):
    class Mine(Returns): ...

    Mine.stop = stop  # type: ignore[attr-defined]
    assert stop_texts(Mine(())) == texts
    assert stop_texts(Returns(())) == ()


def test_a_grader_may_return_a_bool_of_numpy():
    for is_right in (True, np.bool_(True), np.float64(5.0) == 5):
        assert graded_by(lambda text, _, it=is_right: it, "5", problem()).verdict is Verdict.CORRECT
    assert graded_by(lambda text, _: np.bool_(False), "5", problem()).verdict is Verdict.WRONG
    whole = graded_by(lambda text, _: replace(RIGHT, value=5), "5", problem())
    assert (whole.verdict, whole.value) == (Verdict.CORRECT, "5")
    for odd in (1, np.int64(1), replace(RIGHT, verdict="correct")):
        grade = graded_by(lambda text, _, it=odd: it, "5", problem())
        assert grade.verdict is Verdict.ERROR and "the grader returned" in grade.reason


# --- engines --------------------------------------------------------------------------------------

WRITTEN = Completion(token_ids=(4, 1), text="a", logprobs=(-1.0, -0.5), finish_reason="eos")


def require(completions: Any) -> None:
    problems = [problem(str(i)) for i in range(4)]
    _require_whole(completions, problems, max_new=4, vocabulary=8, engine="Mine")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("a", "expected a Completion, got str"),
        ((4, 1), "expected a Completion, got tuple"),
        (
            replace(WRITTEN, token_ids=torch.tensor([4, 1])),
            "expected tuples of token_ids and logprobs, got Tensor and tuple",
        ),
        (replace(WRITTEN, token_ids=(4,) * 5, logprobs=(-1.0,) * 5), "5 tokens; expected at most"),
        (replace(WRITTEN, token_ids=(4, 8)), r"token_ids are \(4, 8\); expected ids below .* 8"),
        (replace(WRITTEN, token_ids=(-1, 1)), "token_ids are"),
        (replace(WRITTEN, token_ids=("a", "b")), "token_ids are"),
        (replace(WRITTEN, token_ids=tuple(torch.tensor([4, 1]))), "token_ids are"),
        (replace(WRITTEN, logprobs=(-1.0, float("nan"))), "logprobs are .* expected finite"),
        (replace(WRITTEN, logprobs=(-1.0, float("-inf"))), "logprobs are"),
        (replace(WRITTEN, logprobs=tuple(torch.tensor([-1.0, -1.0]))), "logprobs are"),
        (replace(WRITTEN, logprobs=(None, None)), "logprobs are"),
        (replace(WRITTEN, finish_reason="max_tokens"), "finish_reason is 'max_tokens'; expected"),
        (replace(WRITTEN, finish_reason=None), "finish_reason is None"),
        (replace(WRITTEN, text=b"a"), "text is b'a'; expected text"),
    ],
)
def test_a_completion_that_is_not_what_was_asked_for_names_the_engine(odd, message: str):
    require([WRITTEN] * 4)
    with pytest.raises(EngineError, match=rf"^engine Mine: problem 2: {message}"):
        require([WRITTEN, WRITTEN, odd, WRITTEN])


@pytest.mark.parametrize("returned", [None, iter([WRITTEN]), "abcd"])
def test_an_engine_returns_a_list(returned):
    with pytest.raises(EngineError, match=r"^engine Mine: returned \w+; expected a list"):
        require(returned)


def test_log_probabilities_may_be_numbers_of_numpy():
    require([replace(WRITTEN, logprobs=(np.float32(-1), np.float32(-2)))] * 4)


# --- algorithms -----------------------------------------------------------------------------------


class Fixed(Clipped):
    """Returns `_result(batch)`."""

    kl_coef: float = 0.0
    _result: Any = None

    def credit(self, batch):
        return self._result(batch)


def batch_of(*lengths: int):
    solutions = [
        Solution(
            problem=problem(str(i)),
            prompt_ids=(2,),
            completion=replace(WRITTEN, token_ids=(4,) * n, logprobs=(-1.0,) * n),
            graded=RIGHT,
            reward=float(i),
        )
        for i, n in enumerate(lengths)
    ]
    return rollout_batch(solutions, device=torch.device("cpu"))


def credited(result, *lengths: int):
    algorithm = Fixed(kind="own.py:Mine")
    algorithm._result = result
    return credited_by(algorithm, batch_of(*lengths))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        # 3 samples of 1 to 3 tokens: (3,) would be broadcast over the tokens without an error
        (
            lambda b: replace(b, advantages=b.rewards),
            r"advantages of shape \(3,\); expected \(3, 3",
        ),
        (lambda b: replace(b, advantages=b.logprobs[:, :2]), r"advantages of shape \(3, 2\)"),
        (lambda b: replace(b, advantages=1.0), r"advantages of shape \(\)"),
        (lambda b: replace(b, returns=b.rewards), r"returns of shape \(3,\); expected \(3, 3\)$"),
        (lambda b: replace(b, returns=b.rewards[:, None]), r"returns of shape \(3, 1\)"),
        (lambda b: None, "NoneType; expected a RolloutBatch of 3"),
        (lambda b: b.rewards, "Tensor; expected a RolloutBatch of 3"),
        (lambda b: b.rows(torch.tensor([0, 1])), "RolloutBatch of 2; expected a RolloutBatch of 3"),
    ],
)
def test_credit_of_another_shape_is_refused(result, message: str):
    with pytest.raises(RecipeError, match=rf"^algorithm own\.py:Mine: credit returned {message}"):
        credited(result, 1, 2, 3)


def test_credit_for_each_token_or_each_sample_is_accepted():
    for result in (
        lambda b: replace(b, advantages=b.logprobs, returns=b.logprobs),
        lambda b: replace(b, advantages=b.rewards[:, None]),
        lambda b: b,
    ):
        assert len(credited(result, 1, 2, 3)) == 3


def test_a_loss_is_a_scalar_with_a_gradient():
    x = torch.ones(2, requires_grad=True)
    right = LossTerms(total=x.sum())
    assert checked_terms(right, "mine") is right
    for wrong in (None, x.sum(), LossTerms(total=x * 2), LossTerms(total=x.sum().detach()), 1.0):
        with pytest.raises(RecipeError, match=r"^algorithm mine: loss returned \w+; expected Loss"):
            checked_terms(wrong, "mine")


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_step_with_advantages_that_are_not_finite_changes_no_weight(make_trainer, odd: float):
    from reftune.errors import NonFiniteError

    trainer = make_trainer({"algorithm": {"kind": "rloo", "kl_coef": 0}})
    assert isinstance(trainer.stage, Rl)
    algorithm = Fixed(kind="own.py:Mine")
    algorithm._result = lambda b: replace(b, advantages=torch.full_like(b.logprobs, odd))
    trainer.algorithm = algorithm
    with pytest.raises(NonFiniteError, match=r"loss is .* the weights were not changed"):
        trainer.step(1)


# --- rewards --------------------------------------------------------------------------------------


def test_a_misspelt_column_beside_kwargs_is_named(tmp_path: Path):
    def reward_of(signature: str) -> Any:
        folder = tmp_path / signature
        folder.mkdir()
        return load(folder, f"def Own({signature}):\n    return [1.0]\n", "rewards")

    for signature in ("completions, wrod, **rest", "completions, wrod", "*rest, wrod, **others"):
        with pytest.raises(RewardError, match=r"has the argument wrod, which is not .* word$"):
            reward_of(signature)([problem(word="x")], [WRITTEN], [RIGHT])
    for signature in ("completions, word, **rest", "word, other=3, **rest", "*rest, **others"):
        assert reward_of(signature)([problem(word="x")], [WRITTEN], [RIGHT]) == [1.0]


# --- datasets from files --------------------------------------------------------------------------

FILE = """
from fractions import Fraction
from reftune.datasets import FileDataset
from reftune.types import Answer, Problem


class Own(FileDataset):
    def problem(self, row):
        if row.id.endswith("2"):
            {odd}
        answer = Answer(kind="text", value=row.text("a"))
        return Problem(id=row.id, question=row.text("q"), answer=answer)
"""


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("return row['q']", "TypeError: 'Row' object is not subscriptable"),
        ("return row.columns['question']", "KeyError: 'question'"),
        ("Fraction(row.text('a'))", "ValueError: Invalid literal for Fraction: 'y'"),
        ("return Problem(question='q')", "TypeError: .* missing 2 required keyword-only"),
        ("return None", "expected a Problem, got None; to leave a row out, raise Unusable"),
        ("return {'question': 'q'}", r"expected a Problem, got \{'question': 'q'\}"),
        ("return Problem(id='1', question='q', answer='y')", "answer: expected an Answer, got 'y'"),
    ],
)
def test_a_row_that_an_own_dataset_cannot_read_is_named(tmp_path: Path, odd: str, message: str):
    (tmp_path / "train.csv").write_text("q,a\none,x\ntwo,y\nthree,z\n")
    dataset = load(tmp_path, FILE.format(odd=odd), "datasets", train=f"{tmp_path}/train.csv")
    where = rf"train\.csv:3: {tmp_path}/own\.py:Own: "
    with pytest.raises(DataError, match=where + message) as error:
        dataset.load(seed=0)
    assert "\n" not in str(error.value)

"""The reranker: its input, its learning, its choices, the stage, and the scores in evaluation
files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from reftune.errors import ModelError, RecipeError
from reftune.model.encoder import Encoder
from reftune.model.policy import Policy
from reftune.model.weights import word_tokenizer
from reftune.recipe import ModelTable, Recipe
from reftune.runs.models import check_stage_graph
from reftune.runs.run import Run, evaluate_methods, open_run, run_stages
from reftune.stages import reward_model
from reftune.stages.optimizer import OptimizerTable, make_optimizer, optimizer_step
from reftune.stages.reward_model import (
    Classifier,
    Solution,
    accumulate_loss,
    dev_metrics,
    labelled,
    load_classifier,
    require_same_tokenizer,
)
from reftune.stages.self_train import Samples
from reftune.stages.stage import Progress
from reftune.types import Answer, Attempt, Graded, Problem, Verdict

WORDS = [f"w{letter}" for letter in "abcdefghijklmnopqrst"]


class Spelled:
    """Uses the prompt as it stands in the problem."""

    def prompt(self, problem: Problem) -> str:
        return problem.question


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, Spelled())


@pytest.fixture
def classifier(make_policy: Callable[..., Policy], encoder: Encoder) -> Classifier:
    return Classifier(make_policy(), encoder, seed=3)


def problem(id: str, question: str = "wa wb") -> Problem:
    return Problem(id=id, question=question, answer=Answer(kind="text", value="x"))


# --- what it reads --------------------------------------------------------------------------------


def test_the_logits_are_those_of_the_last_token_without_eos(classifier, encoder):
    solutions = [(problem("1"), "wc wd we"), (problem("2", "wb"), "wf")]
    found = classifier(classifier.solution_batch(solutions)).logits
    for row, (asked, text) in enumerate(solutions):
        tokens = [*encoder.prompt(asked), *encoder.encode(text)]
        hidden = classifier.policy.model.model(input_ids=torch.tensor([tokens])).last_hidden_state[
            0, -1
        ]
        assert_close(found[row], classifier.head.weight @ hidden, atol=1e-5, rtol=1e-4)


def test_the_likelihood_enters_the_logit_of_correct_alone(classifier):
    solutions = [(problem("1"), "wc wd we"), (problem("2", "wb"), "wf")]
    batch = classifier.solution_batch(solutions)
    plain = classifier(batch).logits
    classifier.likelihood = torch.nn.Linear(1, 1)
    classifier.likelihood.weight.data.fill_(0.5)
    classifier.likelihood.bias.data.fill_(2.0)
    # eos is part of a solution: the policy's own log-probabilities of all its tokens
    total = classifier.policy.score(batch).logprobs.sum(1)
    expected = plain + torch.stack([torch.zeros(2), 0.5 * total + 2], 1)
    assert_close(classifier(batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert classifier.scores(solutions) == pytest.approx(expected.softmax(1)[:, 1].tolist())


def test_the_likelihood_is_standardized_over_the_solutions_at_first(classifier):
    rows = planted(40, seed=0)
    batch = classifier.solution_batch([(s.problem, s.text) for s in rows])
    before = classifier(batch).logits
    classifier.add_likelihood(rows)
    evidence = (classifier(batch).logits - before).detach()
    assert_close(evidence[:, 0], torch.zeros(40))
    total = classifier.policy.score(batch).logprobs.sum(1)
    # never steeper than the likelihood itself: a policy that finds all alike is no evidence
    assert_close(evidence[:, 1], (total - total.mean()) / total.std(correction=0).clamp(min=1))


def test_what_does_not_fit_the_context_is_cut_at_its_end(classifier, encoder):
    # the context is 64: 63 tokens and the eos that they predict
    batch = classifier.solution_batch([(problem("1"), " ".join(WORDS * 5))])
    assert batch.lengths.tolist() == [64]
    assert (
        batch.tokens[0, :63].tolist()
        == [*encoder.prompt(problem("1")), *encoder.encode(" ".join(WORDS * 5))][:63]
    )


def test_equal_texts_of_a_problem_are_one_example_and_no_answer_is_a_wrong_one():
    verdicts = {"a": Verdict.CORRECT, "b": Verdict.WRONG, "c": Verdict.NO_ANSWER}
    found = labelled(samples("1", ["a", "b", "a", "c", "b"], verdicts))
    assert [(solution.text, solution.label) for solution in found] == [("a", 1), ("b", 0), ("c", 0)]


def samples(id: str, texts: list[str], verdicts: dict[str, Verdict]) -> Samples:
    values = {Verdict.CORRECT: "1", Verdict.WRONG: "2"}
    attempts = [
        Attempt(
            completion=text,
            graded=Graded(verdict=verdicts[text], value=values.get(verdicts[text]), reason=""),
        )
        for text in texts
    ]
    return Samples(problem=problem(id), attempts=attempts, num_tokens=9)


# --- learning -------------------------------------------------------------------------------------


def planted(count: int, *, seed: int) -> list[Solution]:
    """Solutions of six words that are correct if `wa` is among the first five."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        label = i % 2
        words = [rng.choice(WORDS[1:]) for _ in range(6)]
        if label:
            words[rng.randrange(5)] = "wa"
        found.append(Solution(problem=problem(str(i), "wt"), text=" ".join(words), label=label))
    return found


def test_a_planted_rule_is_learned(classifier):
    optimizer = make_optimizer(classifier, OptimizerTable(learning_rate=3e-3))
    train, held_out = planted(600, seed=0), planted(200, seed=1)
    for step in range(60):
        rows = train[step * 30 % 600 :][:30]
        accumulate_loss(classifier, rows)
        optimizer_step(classifier, optimizer, share=1, max_grad_norm=1)
    scores = classifier.scores([(s.problem, s.text) for s in held_out])
    right = sum((score > 0.5) == bool(s.label) for score, s in zip(scores, held_out, strict=True))
    assert right >= 180, f"{right} of 200; guessing gets 100"


def test_the_gradient_is_that_of_the_mean_however_it_is_split(classifier):
    rows = [
        Solution(problem=problem(str(i)), text=" ".join(WORDS[: 1 + 3 * i]), label=i % 2)
        for i in range(5)
    ]
    gradients = []
    for max_tokens in (10_000, 1):
        classifier.zero_grad()
        classifier.policy.max_tokens = max_tokens
        metrics = accumulate_loss(classifier, rows)
        gradients.append(classifier.head.weight.grad.clone())
    assert_close(gradients[0], gradients[1])
    # mean of -log softmax of the labels
    logits = classifier(classifier.solution_batch([(s.problem, s.text) for s in rows])).logits
    expected = -logits.log_softmax(1)[torch.arange(5), [0, 1, 0, 1, 0]].mean()
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["reward_model/accuracy"] == pytest.approx(
        float((logits.argmax(1) == torch.tensor([0, 1, 0, 1, 0])).float().mean())
    )


def test_only_correct_solutions_are_imitated(classifier):
    rows = [
        Solution(problem=problem(str(i)), text=" ".join(WORDS[: 1 + 3 * i]), label=i % 2)
        for i in range(5)
    ]
    classifier.add_likelihood(rows)
    plain = accumulate_loss(classifier, rows, lm_coef=0.0)
    classifier.zero_grad()
    gradients = []
    for max_tokens in (10_000, 1):
        classifier.zero_grad()
        classifier.policy.max_tokens = max_tokens
        found = accumulate_loss(classifier, rows, lm_coef=0.3)
        gradients.append(classifier.likelihood.weight.grad.clone())
    assert_close(gradients[0], gradients[1])
    # rows 1 and 3 are correct: the mean over their 5 + 11 tokens, eos included
    correct = classifier.solution_batch([(s.problem, s.text) for s in rows if s.label])
    nll = -classifier.policy.score(correct).logprobs.sum() / 16
    assert found["reward_model/nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert found["loss/total"] == pytest.approx(plain["loss/total"] + 0.3 * nll.item(), rel=1e-5)


def test_without_a_correct_solution_nothing_is_imitated(classifier):
    rows = [Solution(problem=problem("1"), text=word, label=0) for word in WORDS[:3]]
    classifier.add_likelihood(rows)
    found = accumulate_loss(classifier, rows, lm_coef=0.3)
    assert "reward_model/nll" not in found
    assert found["loss/total"] == accumulate_loss(classifier, rows)["loss/total"]


def test_the_value_head_is_not_trained(classifier):
    trained = {
        id(p)
        for group in make_optimizer(classifier, OptimizerTable(learning_rate=1)).param_groups
        for p in group["params"]
    }
    assert id(classifier.head.weight) in trained
    assert id(classifier.policy.value_head.weight) not in trained


# --- choosing -------------------------------------------------------------------------------------


def test_scores_are_probabilities_and_equal_texts_are_read_once(classifier, monkeypatch):
    solutions = [
        (problem("1"), "wc"),
        (problem("1"), "wd"),
        (problem("1"), "wc"),
        (problem("2", "wg"), "wc"),
    ]
    read = []
    batch_of = classifier.solution_batch
    monkeypatch.setattr(
        classifier, "solution_batch", lambda part: read.append(len(part)) or batch_of(part)
    )
    monkeypatch.setattr(reward_model, "SOLUTIONS_AT_ONCE", 2)
    scores = classifier.scores(solutions)
    assert read == [2, 1]
    assert scores[0] == scores[2] != scores[3]
    logits = classifier(batch_of(solutions)).logits
    assert scores == pytest.approx(logits.softmax(1)[:, 1].tolist(), abs=1e-6)


@pytest.mark.parametrize("likelihood", [False, True])
def test_scores_are_computed_in_fp32_from_states_in_bf16(make_policy, encoder, likelihood):
    classifier = Classifier(make_policy("llama", dtype=torch.bfloat16), encoder, seed=1)
    solutions = [
        Solution(problem=problem("1"), text=text, label=label)
        for text, label in (("wc wd we", 1), ("wf", 0))
    ]
    if likelihood:
        classifier.add_likelihood(solutions)
    with torch.no_grad():
        classifier.head.weight.mul_(50)  # so that logits rounded to bf16 would differ
        for one in solutions:
            pair = (one.problem, one.text)
            logits = classifier(classifier.solution_batch([pair])).logits
            assert logits.dtype == torch.float32
            assert classifier.scores([pair]) == pytest.approx(logits.softmax(1)[:, 1].tolist())


def test_dropout_plays_no_part_in_scores(make_policy, encoder):
    policy = make_policy("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    classifier = Classifier(policy, encoder).train()
    twice = [classifier.scores([(problem("1"), "wc wd")]) for _ in range(2)]
    assert twice[0] == twice[1]
    assert classifier.policy.training


def test_the_best_sample_with_an_answer_is_taken(classifier, monkeypatch):
    # E25: .9 on a sample without a value, .4 and .6 on valid ones: the .6 one, which is right here
    # and wrong there
    liked = {"a": 0.4, "b": 0.6, "c": 0.9}
    monkeypatch.setattr(
        classifier, "scores", lambda solutions: [liked[text] for _, text in solutions]
    )
    drawn = [
        samples(
            "1", ["a", "b", "c"], {"a": Verdict.WRONG, "b": Verdict.CORRECT, "c": Verdict.NO_ANSWER}
        ),
        samples("2", ["b", "a", "a"], {"a": Verdict.CORRECT, "b": Verdict.WRONG}),
    ]
    # chance among the samples with an answer: 1/2 and 2/3; gains: 1/2 and -2/3, whose standard
    # deviation is (7/12) √2, over √2
    assert dev_metrics(classifier, drawn) == pytest.approx(
        {"dev/accuracy": 0.5, "dev/chance": 7 / 12, "dev/chance_margin": 1.96 * 7 / 12}, rel=1e-4
    )
    one = dev_metrics(classifier, drawn[:1])
    assert one["dev/accuracy"] - one["dev/chance"] < one["dev/chance_margin"], "one proves nothing"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [False, True])
def test_a_saved_classifier_gives_the_same_scores(classifier, encoder, tmp_path, likelihood: bool):
    from reftune.model.weights import load_model

    solutions = [(problem("1"), "wc wd"), (problem("1"), "we")]
    if likelihood:
        classifier.add_likelihood(planted(8, seed=0))
    classifier.save(tmp_path)
    loaded = load_classifier(Policy(*load_model(ModelTable(path=str(tmp_path)))), encoder, tmp_path)
    expected = classifier.scores(solutions)
    assert loaded.scores(solutions) == pytest.approx(expected, abs=1e-6)


def test_a_folder_without_a_classifier_is_named(make_policy, encoder, tmp_path):
    with pytest.raises(ModelError, match=r"not a reward model: classifier\.safetensors") as caught:
        load_classifier(make_policy(), encoder, tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and len(str(caught.value).splitlines()) == 1


def test_a_reranker_of_another_tokenizer_is_refused_in_one_line(
    classifier, make_policy, make_model
):
    require_same_tokenizer(classifier, make_policy(seed=1), where="")
    other = Policy(make_model("llama"), word_tokenizer(["wb wa"]))
    with pytest.raises(
        ModelError, match=r"^evaluate\.rerank: rm: was trained with another tokenizer, of \d+"
    ) as caught:
        require_same_tokenizer(classifier, other, where="evaluate.rerank: rm")
    assert len(str(caught.value).splitlines()) == 1


# --- the stage ------------------------------------------------------------------------------------

OPTIMIZER = {"learning_rate": 3e-3}
REWARD_MODEL = {
    "kind": "reward_model",
    "init": "sft",
    "sampler": "sft",
    "samples": 3,
    "dev_samples": 2,
    "epochs": 1,
    "batch_size": 16,
    "optimizer": OPTIMIZER,
}
SFT = {"epochs": 1, "snapshots": None}


@pytest.fixture
def make_reranked(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """SFT, a reward model on its samples, and an evaluation that is reranked with it."""

    def make(**evaluate: Any) -> Recipe:
        stages = {"sft": SFT, "reft": None, "judge": REWARD_MODEL}
        return make_recipe(
            stages=stages,
            evaluate={"samples": 3, "stages": None, "rerank": "judge", "limit": 4, **evaluate},
        )

    return make


def test_a_run_with_a_reward_model_scores_every_sample_once(make_reranked):
    recipe = make_reranked()
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("judge")
        assert recipe.methods_to_evaluate == ["sft"], "a reward model answers no problems"
        run.evaluation.answer("sft")
        run.evaluation.score_samples()
        path = recipe.folder / "eval" / "sft.jsonl"
        scored = path.read_bytes()
        run.evaluation.answer("sft")
        run.evaluation.score_samples()
    assert path.read_bytes() == scored
    scores = [
        [sample["score"] for sample in json.loads(line)["samples"]] for line in scored.splitlines()
    ]
    assert [len(row) for row in scores] == [3] * 4 and all(
        0 <= score <= 1 for row in scores for score in row
    )
    assert len({score for row in scores for score in row}) > 1
    folder = recipe.folder / "stages" / "judge"
    assert {"weight", "likelihood.weight", "likelihood.bias"} == set(
        load_file(folder / "classifier.safetensors")
    )
    document = json.loads((folder / "stage.json").read_text())
    assert (document["kind"], document["init"], document["dev_n"]) == (
        "reward_model",
        "sft",
        len(run.splits.dev),
    )
    assert document["chosen_step"] > 0, "an untrained classifier is no candidate"
    assert {
        "classifier.safetensors",
        "model.safetensors",
        "config.json",
        "sampled.jsonl",
        "sampled_dev.jsonl",
    } <= names(folder)
    assert len((folder / "sampled_dev.jsonl").read_text().splitlines()) == len(run.splits.dev), (
        "dev, never test"
    )
    lines = [
        line
        for file in ("sampled.jsonl", "sampled_dev.jsonl")
        for line in (folder / file).read_text().splitlines()
    ]
    assert document["sampled_tokens"] == sum(json.loads(line)["tokens"] for line in lines)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_that_was_answered_before_is_only_scored(make_reranked):
    recipe = make_reranked()
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("judge")
        run.evaluation.answer("sft")
        path = recipe.folder / "eval" / "sft.jsonl"
        answered = [json.loads(line) for line in path.read_text().splitlines()]
        assert not any("score" in sample for row in answered for sample in row["samples"])
        run.evaluation.score_samples()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["samples"] = [
            {key: value for key, value in sample.items() if key != "score"}
            for sample in row["samples"]
        ]
    assert rows == answered
    # its folder's name stands for the same reward model
    scored = path.read_bytes()
    path.write_text("".join(json.dumps(row) + "\n" for row in answered))
    named = make_reranked(rerank=str(recipe.folder / "stages" / "judge"))
    Run(named, Progress()).evaluation.score_samples()
    assert path.read_bytes() == scored


def test_a_reward_model_that_is_not_trained_is_named_before_anything_is_evaluated(make_reranked):
    recipe = make_reranked()
    run_stages(recipe, kind="sft", progress=Progress())
    with pytest.raises(RecipeError, match=r"stages/judge: not trained yet; `reftune run` trains"):
        evaluate_methods(recipe, ["sft"], progress=Progress())
    assert not (recipe.folder / "eval").exists()


def test_a_method_is_scored_although_anothers_evaluation_is_incomplete(make_recipe):
    stages = {"sft": {"epochs": 1}, "reft": None, "judge": REWARD_MODEL}
    evaluate = {"samples": 2, "stages": None, "rerank": "judge", "limit": 4}
    recipe = make_recipe(stages=stages, evaluate=evaluate)
    with open_run(recipe, Progress()) as run:
        run.train("sft")
        run.train("judge")
        run.evaluation.answer("warmup")
    path = recipe.folder / "eval" / "warmup.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    summary = evaluate_methods(recipe, ["sft"], progress=Progress())
    assert list(summary["methods"]) == ["sft"]
    assert "score" not in path.read_text()
    assert "score" in (recipe.folder / "eval" / "sft.jsonl").read_text()


def test_another_runs_reward_model_is_found_by_its_folder_and_its_tokenizer_checked(
    make_reranked, make_recipe, tmp_path, make_policy, encoder
):
    folder = tmp_path / "judge"
    Classifier(make_policy(), encoder).save(folder)
    stages = {"sft": SFT, "reft": None}
    recipe = make_recipe(
        stages=stages, evaluate={"samples": 2, "stages": None, "rerank": str(folder)}
    )
    with (
        pytest.raises(ModelError, match="was trained with another tokenizer"),
        open_run(recipe, Progress()),
    ):
        pass
    assert not recipe.folder.exists(), "refused before anything was written"


def test_reranking_asks_for_a_reward_model_and_for_samples(make_reranked):
    with pytest.raises(
        RecipeError,
        match=(
            r"^evaluate\.rerank: sft is not a reward model: neither one of this recipe's \(judge\)"
        ),
    ):
        check_stage_graph(make_reranked(rerank="sft"))
    with pytest.raises(RecipeError, match=r"^evaluate\.stages: judge is not a method; known: sft$"):
        check_stage_graph(make_reranked(stages=["judge"]))
    with pytest.raises(
        RecipeError, match=r"rerank: expected samples > 0, because samples are reranked"
    ):
        make_reranked(samples=0)


def test_nothing_grows_from_a_reward_model(make_recipe):
    late = {"kind": "sft", "init": "judge", "epochs": 1, "batch_size": 8, "optimizer": OPTIMIZER}
    recipe = make_recipe(
        stages={"sft": SFT, "reft": None, "judge": REWARD_MODEL, "late": late},
        evaluate={"stages": None},
    )
    with pytest.raises(
        RecipeError,
        match=r"^stages\.late\.init: judge is not an earlier method; known here: base, sft$",
    ):
        check_stage_graph(recipe)

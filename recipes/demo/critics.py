"""Variants of PPO's critic, and RL from prefixes of gold solutions. `recipes/demo/critics.yaml`
compares them, and docs/experiments/critic.md has the results. To use them in a stage, write
`kind: demo/critics.py:Prefixes`, or `kind: rl` and `algorithm: {kind: demo/critics.py:Evpo}`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from reftune.algorithms.base import LossTerms, explained_variance, gae, token_rewards, whiten
from reftune.algorithms.ppo import Ppo
from reftune.model.batch import RolloutBatch
from reftune.model.policy import Policy, TokenScores
from reftune.stages.rl import Rl, Trainer
from reftune.stages.rollouts import Collector, Solved
from reftune.stages.stage import StageContext
from reftune.types import Problem, Solution

# --- algorithms -----------------------------------------------------------------------------------


class LambdaByLength(Ppo):
    """At any length, about half of the final reward reaches the first token's advantage.

        λ = ½^(1/L)        L = number of tokens of the response

    Source: JustRL-II. Differences: no other part of JustRL-II's critic is used. `lam` is not read.
    """

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        mask = batch.response_mask
        lam = 0.5 ** (1 / mask.sum(1).clamp(min=1))
        advantages, returns = estimates(self, batch, lam)
        return replace(batch, advantages=whiten(advantages, mask), returns=returns)


class Evpo(Ppo):
    """The critic is used only in rollouts in which it explains some of the returns' variance. In
    other rollouts, the baseline is the mean of the returns.

        A = G − mean of G  if  1 − Var(G − V) / Var(G) ≤ 0        G = returns with λ = 1

    Source: EVPO (arXiv:2604.19485). Differences: advantages are whitened, as in `Ppo`.
    """

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        assert batch.values is not None
        credited, mask = super().credit(batch), batch.response_mask
        _, returns = estimates(self, batch, 1.0)
        if explained_variance(batch.values, returns, mask) > 0:
            return credited
        return replace(credited, advantages=whiten(returns, mask))  # subtracts the mean


class Bpco(Ppo):
    """A bounded critic, fitted to returns with λ = 1, and advantages that are not whitened.

        V = clip(value head, 0, 1)        λ = 1 − 1/(0.4 L)

    Rewards must lie between 0 and 1. Source: BPCO (arXiv:2608.23566). Differences: BPCO bounds V by
    atan, masks tokens by |π − π_old| instead of clipping ratios, and draws one sample per problem.
    `lam` is not read.
    """

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        assert batch.values is not None
        bounded = replace(batch, values=batch.values.clamp(0, 1))
        lengths = batch.response_mask.sum(1).clamp(min=1)
        advantages, _ = estimates(self, bounded, (1 - 1 / (0.4 * lengths)).clamp(min=0))
        _, returns = estimates(self, bounded, 1.0)
        return replace(bounded, advantages=advantages, returns=returns)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        return super().loss(scores._replace(values=scores.values.clamp(0, 1)), batch)


def estimates(algorithm: Ppo, batch: RolloutBatch, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B, R) advantages and (B, R) returns, as in `Ppo.credit` but with another λ, which may be a
    tensor (B,)."""
    assert batch.values is not None
    mask, kl_coef = batch.response_mask, algorithm.kl_coef
    rewards = token_rewards(
        batch.rewards, batch.logprobs, batch.ref_logprobs, mask, kl_coef=kl_coef
    )
    return gae(rewards, batch.values, mask, gamma=algorithm.gamma, lam=lam)


# --- stages ---------------------------------------------------------------------------------------


class Detached(Rl):
    """RL in which the value loss trains the value head but sends no gradient into the
    transformer."""

    def run(self, context: StageContext) -> None:
        hook = context.policy.value_head.register_forward_pre_hook(_detach)
        super().run(context)
        hook.remove()


def _detach(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].detach(),)


class Prefixes(Rl):
    """RL from prefixes of gold solutions. The prefixes shrink to nothing over the first half of the
    steps. A prefix counts as part of the prompt, so it is not trained on. It is graded together
    with the completion.

        share(n) = 0.8 · max(0, 1 − (n − 1) / (steps / 2))        n = 1, 2, …

    Source: R3 (arXiv:2402.05808). Differences: the schedule is ours.
    """

    reads_rationales: ClassVar[bool] = True

    def run(self, context: StageContext) -> None:
        PrefixTrainer(self, context).run()


class PrefixTrainer(Trainer):
    def sample(self, n: int, purpose: str) -> tuple[list[Solution], dict[str, float]]:
        """Like `Trainer.sample`, but a rollout for training starts from prefixes."""
        plain = self.context.collector
        if purpose == "rollout":
            parts = {each.name: getattr(plain, each.name) for each in fields(plain)}
            collector = PrefixCollector(**parts, share=prefix_share(n, self.stage.steps))
            self.context = replace(self.context, collector=collector)
        found = super().sample(n, purpose)
        self.context = replace(self.context, collector=plain)
        return found


def prefix_share(n: int, steps: int) -> float:
    """The share of the gold solution's tokens that form the prefix in step `n`; see `Prefixes`."""
    return 0.8 * max(0.0, 1 - (n - 1) / (steps / 2))


@dataclass(frozen=True, kw_only=True)
class PrefixCollector(Collector):
    """Samples continue the first tokens of the gold solution."""

    share: float
    """Share of the gold solution's tokens, without its eos, that form the prefix."""

    def prefix(self, problem: Problem) -> list[int]:
        gold = self.encoder.target(problem)[:-1]
        return gold[: int(self.share * len(gold))]

    def prompts(self, problems: Sequence[Problem], policy: Policy) -> list[list[int]]:
        plain = super().prompts(problems, policy)
        return [[*ids, *self.prefix(each)] for ids, each in zip(plain, problems, strict=True)]

    def prompt_limit(self, policy: Policy) -> float:
        """No limit: a run checks its questions when it starts, and `solve` samples fewer tokens
        after a prefix."""
        return math.inf

    def solve(self, policy: Policy, problems: Sequence[Problem], **options: Any) -> Solved:
        """Like `Collector.solve`, but `lengths.max_new` includes the shortest prefix, and prefix
        and completion are graded together."""
        prefixes = [self.prefix(problem) for problem in problems]
        longest = self.lengths.max_new - min(map(len, prefixes))
        lengths = self.lengths.model_copy(update={"max_new": longest})
        solved = Collector.solve(replace(self, lengths=lengths), policy, problems, **options)
        texts = [
            policy.completion([*prefix, *completion.token_ids], ()).text
            for prefix, completion in zip(prefixes, solved.completions, strict=True)
        ]
        return replace(solved, graded=self.encoder.grade(problems, texts))

"""Online self-training takes supervised steps on the correct samples of each rollout and on the
gold solutions to all problems of the rollout.

To match ReFT's code more closely, set `gold_max_tokens: 300` and `dropout: true`. Long gold
solutions are then truncated, as in ReFT's code, so the model never sees how they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from reftune.algorithms.base import Algorithm, LossTerms, token_weights
from reftune.model.batch import RolloutBatch
from reftune.model.encoder import Encoder
from reftune.model.policy import TokenScores
from reftune.types import Completion, Graded, Solution, Verdict


class OnlineSt(Algorithm):
    gold_max_tokens: int | None = Field(None, gt=0)
    """Gold solutions are truncated so that prompt and solution together have at most this many
    tokens. Default: no truncation."""
    dropout: bool = False
    """Keep dropout on during updates."""

    sets_advantages: ClassVar[bool] = False

    @property
    def trains_with_dropout(self) -> bool:
        return self.dropout

    def select(self, solutions: Sequence[Solution], encoder: Encoder) -> list[Solution]:
        """The correct samples, followed by the gold solutions of all sampled problems that have
        one. Problems without a correct sample are included."""
        correct = [solution for solution in solutions if solution.graded.verdict is Verdict.CORRECT]
        sampled = {solution.problem.id: solution for solution in solutions}.values()
        gold = [self._gold(r, encoder) for r in sampled if r.problem.rationale is not None]
        return [*correct, *(solution for solution in gold if solution.completion.token_ids)]

    def _gold(self, sampled: Solution, encoder: Encoder) -> Solution:
        """The gold solution to the problem of `sampled`, truncated so that prompt and solution
        together have at most `gold_max_tokens` tokens."""
        kept = whole = encoder.target(sampled.problem)
        if self.gold_max_tokens is not None:
            kept = whole[: max(0, self.gold_max_tokens - len(sampled.prompt_ids))]
        completion = Completion(
            token_ids=tuple(kept),
            text=encoder.decode(kept),
            logprobs=(0.0,) * len(kept),
            finish_reason="eos" if len(kept) == len(whole) else "length",
        )
        graded = Graded(verdict=Verdict.CORRECT, value=str(sampled.problem.answer), reason="gold")
        return replace(sampled, completion=completion, graded=graded, reward=1.0, source="gold")

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        return batch

    def weights(self, batch: RolloutBatch) -> Tensor:
        """The tokens of the correct samples share half of the weight equally. The tokens of the
        gold solutions share the other half equally."""
        mask, gold = batch.response_mask, batch.gold[:, None]
        return 0.5 * token_weights(mask & ~gold, "token") + 0.5 * token_weights(
            mask & gold, "token"
        )

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """½ cross-entropy of the correct samples + ½ cross-entropy of the gold solutions. A term
        without tokens is 0.

        Source: ReFT's code (arXiv:2401.08967, §4.2). Differences: here, each half is a mean over
        all its tokens in the minibatch, whereas in ReFT's code, it is a mean over the samples of
        one GPU.
        """
        assert batch.weights is not None
        nll = -scores.logprobs * batch.weights
        gold = nll[batch.gold].sum()
        sampled = nll.sum() - gold
        metrics = {
            "policy/positive_nll": 2 * sampled.detach(),
            "policy/gold_nll": 2 * gold.detach(),
        }
        return LossTerms(total=sampled + gold, metrics=metrics)

"""An algorithm of your own. This one is REINFORCE, with the mean reward of the rollout as the
baseline. The training loop around it does not change.

To use it, set `algorithm: {kind: examples/algorithm.py:Reinforce}` in a stage of kind `rl`.
"""

from dataclasses import replace

from reftune.algorithms.base import Algorithm, LossTerms
from reftune.model.batch import RolloutBatch
from reftune.model.policy import TokenScores


class Reinforce(Algorithm):
    baseline: bool = True
    """Whether the mean reward is subtracted from each reward."""

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """A = r − mean r, the same for every token of a solution."""
        earned = batch.rewards - batch.rewards.mean() if self.baseline else batch.rewards
        return replace(batch, advantages=earned[:, None] * batch.response_mask)

    def loss(self, scores: TokenScores, batch: RolloutBatch) -> LossTerms:
        """L = − Σ A log π, weighted by `batch.weights`, so that the gradient does not depend on how
        a rollout is split into micro-batches."""
        assert batch.advantages is not None and batch.weights is not None
        loss = -(batch.advantages * scores.logprobs * batch.weights).sum()
        return LossTerms(total=loss, metrics={"policy/loss": loss.detach()})

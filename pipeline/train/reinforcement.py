"""LARES's second stage (arXiv:2505.16865, RPT): a reward for lists with the next item far up.

    G passes of one batch, each with noise and a number of steps of its own
    reward r      NDCG@10 or Recall@10 of the last step's ranking of all items
    advantage A   (r − mean of the G) / (deviation of the G + 1e-4)
    loss          − mean over steps i of [ exp(l_i − sg(l_i))·A − β·(exp(d_i) − d_i − 1) ]

l_i is the log of the next item's share after step i, sg stops the gradient, and d_i is l_i of the
model that the stage began with less l_i. The first part has the gradient A·∇l_i; the second holds
the model near that start.

After the authors' code, the deviation divides by G − 1, and passes count alike whatever their
steps. Ours: the start reads with the draws of the pass that it is held against, noise and dropout
too, so that both agree at first (theirs shares the number of steps alone, without dropout); an item
whose score equals the next item's stands before it; every row stays, also where the G rewards agree
and the advantage is 0 (theirs drops rows first, by three passes).

The advantages of a row sum to 0 and its next item is the same in all passes, so what the passes
share has no gradient from the first part: only what tells them apart has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.full_softmax.op import log_partition
from pipeline.batches.collate import SequenceBatch
from pipeline.config import RetrievalConfig
from pipeline.model.encoders.encoder import Encoded
from pipeline.model.ranker import RankingModel
from pipeline.model.retrieval import RetrievalHead
from pipeline.train.generators import generator_states, set_generators

CUTOFF = 10  # places of the list that are rewarded
LEAST_DEVIATION = 1e-4
MOST_SCORES = 2**26  # in memory at once while items are ranked


@dataclass(frozen=True, slots=True)
class StochasticPass:
    """A batch as the model read it, and as the start of the stage did with the same draws."""

    encoded: Encoded
    start: Encoded


class Reinforcement:
    """The loss of the second stage.

    Args:
        start: a model of the same shape; `keep_start` gives it the weights to be held near.
    """

    def __init__(self, cfg: RetrievalConfig, start: RankingModel) -> None:
        self.cfg = cfg
        # in training, since only then steps and noise are drawn
        self.start = start.requires_grad_(False).train()

    def keep_start(self, model: RankingModel) -> None:
        """Take the present weights for those of the start."""
        self.start.load_state_dict(model.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Weights of the start by name: a run that goes on needs them."""
        return dict(self.start.state_dict())

    def read_passes(self, model: RankingModel, batch: SequenceBatch) -> list[StochasticPass]:
        """`retrieval.reinforce_passes` readings of a batch with its ids left out."""
        passes = []
        for _ in range(self.cfg.reinforce_passes):
            states = generator_states()
            encoded = model.encode_codes(batch)

            # the same draws again, after which the generators stand where they stood
            set_generators(states)
            with torch.no_grad():
                start = self.start.encode_codes(batch)
            passes.append(StochasticPass(encoded, start))
        return passes

    def __call__(
        self,
        model: RankingModel,
        passes: Sequence[StochasticPass],
        batch: SequenceBatch,
        item_codes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and sum of the weights, [1] each; `item_codes` are of all items.

        The first part's mean over the passes is 0 whatever the model. 1 − reward stands in its
        place, a constant: the number that is logged falls as the reward rises.
        """
        assert batch.next_code is not None and batch.next_weight is not None
        assert model.retrieval is not None and self.start.retrieval is not None
        item = batch.next_code - 1
        items = model.retrieval.item_vectors(item_codes)
        with torch.no_grad():
            start_items = self.start.retrieval.item_vectors(item_codes)

        # rewards of all passes come before the first advantage
        rewards = []
        for one in passes:
            assert one.encoded.next_rows is not None
            users = model.retrieval.user_vectors(one.encoded.next_rows)
            place = item_places(users.detach(), items.detach(), item)
            rewards.append(place_rewards(place, self.cfg.reinforce))
        reward_GP = torch.stack(rewards)
        advantage_GP = group_advantages(reward_GP)

        losses = []
        for one, reward, advantage in zip(passes, reward_GP, advantage_GP, strict=True):
            log_share = step_log_shares(model.retrieval, one.encoded, items, item)
            with torch.no_grad():
                start = step_log_shares(self.start.retrieval, one.start, start_items, item)
            loss = pass_loss(log_share, start, advantage, self.cfg.reinforce_kl)
            losses.append(loss + advantage + 1 - reward)

        # rows of zeros: nothing of the history was left there
        rows = passes[0].encoded.next_rows
        assert rows is not None
        weight = batch.next_weight * (rows != 0).any(1)
        loss = (torch.stack(losses).mean(0) * weight).sum()
        return loss.view(1), weight.sum().view(1)


def step_log_shares(head: RetrievalHead, encoded: Encoded, items: Tensor, item: Tensor) -> Tensor:
    """[steps, P]: log of the next item's share among all items after each step."""
    steps = encoded.every_step
    assert steps is not None
    users = head.user_vectors(torch.cat(steps)) * head.score_scale
    score = (users * items[item.repeat(len(steps))]).sum(1)
    return (score - log_partition(users, items)).view(len(steps), -1)


def pass_loss(log_share_SP: Tensor, start_SP: Tensor, advantage_P: Tensor, kl: float) -> Tensor:
    """[P]: the loss of one pass, the mean over its S steps."""
    policy = (log_share_SP - log_share_SP.detach()).exp() * advantage_P
    apart = start_SP - log_share_SP
    drift = apart.exp() - apart - 1
    return (kl * drift - policy).mean(0)


def group_advantages(reward_GP: Tensor) -> Tensor:
    """[G, P]: how far each pass's reward lies above the mean of the G, in deviations of theirs.

    rewards       1   0   0   0       mean .25, deviation .5
    advantage   1.5 −.5 −.5 −.5
    """
    above = reward_GP - reward_GP.mean(0)
    return above / (reward_GP.std(0) + LEAST_DEVIATION)


def item_places(users: Tensor, items: Tensor, item: Tensor) -> Tensor:
    """int64 [P]: the place of each next item among all, from 1; behind those of equal score."""
    rows = max(MOST_SCORES // len(items), 1)
    places = []
    for part, own in zip(users.split(rows), item.split(rows), strict=True):
        scores = part @ items.T
        places.append((scores >= scores.gather(1, own.long()[:, None])).sum(1))
    return torch.cat(places)


def place_rewards(place: Tensor, kind: str) -> Tensor:
    """float32 [P], of the kind `retrieval.reinforce`; 0 behind place 10.

    place          1    2    3  11
    recall_10      1    1    1   0
    ndcg_10        1  .63   .5   0
    """
    reward = torch.ones_like(place, dtype=torch.float32)
    if kind == "ndcg_10":
        reward = 1 / (place + 1).float().log2()
    return reward.masked_fill(place > CUTOFF, 0)

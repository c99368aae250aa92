"""The loss of a next item: how well the row before it tells it from other items.

    rows before the next items → user vectors ─┐
                                               ├→ −log softmax of the next item's score
    items that it is told apart from → vectors ┘

`retrieval.loss` says which items those are. Item numbers here are codes less one: number i is row i
+ 1 of the table of ids.
"""

import math

import torch
from torch import Tensor

from kernels.full_softmax.op import log_partition
from kernels.full_softmax.torch_chunked import chunked_log_partition
from kernels.sampled_softmax.op import draw_negatives, sampled_softmax
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.config import RetrievalConfig
from pipeline.model.encoders.encoder import Encoded
from pipeline.model.ranker import RankingModel
from pipeline.model.retrieval import RetrievalHead
from pipeline.train.alignment import contrast, draw_rows, partners
from pipeline.train.memory import CrossBatchMemory

LOSS_NAME = "next_item"
NO_WEIGHT = 1e-30  # in the place of 0, so that a mean over nothing is 0 and not undefined


class NextItemLoss:
    """Summed losses and weights of a batch's next items.

    The items are those of the training period: one that training never saw could only be learned as
    wrong.

    Args:
        id_dropout: the share of ids that a step leaves out, as `features.item_id_dropout`.
        precision: of the encoder's rows, as `train.precision`.
    """

    def __init__(
        self,
        cfg: RetrievalConfig,
        maps: FeatureMaps,
        device: torch.device | str,
        *,
        id_dropout: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        self.cfg, self.id_dropout = cfg, id_dropout
        # rows of the encoder in bfloat16 know less than TF32 keeps; else as PyTorch is set
        self.tf32 = True if precision == "bf16" else None

        # the items that training saw, by their codes
        codes = torch.from_numpy(maps.item_codes)
        seen = codes[:, 0] > 0
        order = codes[seen, 0].argsort()
        self.item_codes = codes[seen][order].to(device)

        self.popularity: Tensor | None = None
        if self.cfg.loss in ("popularity", "in_batch"):
            counts = torch.from_numpy(maps.next_count)[seen][order].float()
            self.popularity = (counts / counts.sum()).to(device)

        self.memory: CrossBatchMemory | None = None
        if self.cfg.memory != "none":
            self.memory = CrossBatchMemory(self.cfg, device)

    def __call__(
        self,
        model: RankingModel,
        encoded: Encoded,
        batch: SequenceBatch,
        again: Encoded | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and sum of the weights, [1] each; `again` is a second pass over the
        batch, for the alignments.
        """
        head, rows = model.retrieval, encoded.next_rows
        assert head is not None and rows is not None
        assert batch.next_code is not None and batch.next_weight is not None

        # rows of zeros: nothing of the history was left there
        weight = batch.next_weight * (rows != 0).any(1)
        users, item = head.user_vectors(rows), batch.next_code - 1
        if self.cfg.loss == "full":
            loss = (self._full(head, users, item) * weight).sum()
        elif self.cfg.loss == "in_batch":
            loss = (self._in_batch(head, users, item) * weight).sum()
        else:
            loss = self._sampled(head, users, item, weight)

        if again is not None:
            loss = loss + self._aligned(encoded, again, item) * weight.sum()
        return loss.view(1), weight.sum().view(1)

    def read_codes(self) -> Tensor:
        """Codes of all items in the order of their numbers, as one step reads them."""
        return self._codes(self.item_codes)

    @property
    def needs_second_pass(self) -> bool:
        return self.cfg.align_trajectories > 0 or self.cfg.align_steps > 0

    def _aligned(self, encoded: Encoded, again: Encoded, item: Tensor) -> Tensor:
        """The alignments by their weights, for a next item; a number."""
        first, a, s = encoded.next_rows, again.next_rows, again.step_rows
        assert first is not None and a is not None and s is not None
        chosen = draw_rows(len(item), item.device)
        of, temperature = item[chosen], self.cfg.align_temperature

        b = first[partners(item)[chosen]]
        trajectories = contrast(a[chosen], b, of, temperature)
        steps = contrast(a[chosen], s[chosen], of, temperature)
        return self.cfg.align_trajectories * trajectories + self.cfg.align_steps * steps

    def _full(self, head: RetrievalHead, users: Tensor, item: Tensor) -> Tensor:
        """[P]: against all items; with label smoothing a share of the target is every item's.

        −(1 − s)·score(item) − s·mean score + log Σ exp score
        """
        users = users * head.score_scale
        items = head.item_vectors(self._codes(self.item_codes))
        score = (users * items[item]).sum(1)
        smoothing = self.cfg.label_smoothing
        if smoothing > 0:
            score = torch.lerp(score, users @ items.mean(0), smoothing)
        return log_partition(users, items, tf32=self.tf32) - score

    def _sampled(self, head: RetrievalHead, users: Tensor, item: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of the losses against items drawn for each next item."""
        shape, num_items = (len(item), self.cfg.negatives), len(self.item_codes)
        log_rates = None
        if self.popularity is None:
            drawn = draw_negatives(num_items, *shape, device=item.device)
        else:
            drawn = draw_by_share(self.popularity, shape)
            if self.cfg.logq_correction:
                log_rates = (self.popularity * self.cfg.negatives).clamp(min=NO_WEIGHT).log()

        # of a large catalogue only the vectors that are used
        codes = self.item_codes
        if num_items > drawn.numel() + len(item):
            used, place = torch.unique(torch.cat([item[:, None], drawn], 1), return_inverse=True)
            codes, item, drawn = codes[used], place[:, 0], place[:, 1:]
            log_rates = None if log_rates is None else log_rates[used]

        mean = sampled_softmax(
            users,
            head.item_vectors(self._codes(codes)),
            item,
            drawn,
            weights=weight.clamp(min=NO_WEIGHT),
            log_rates=log_rates,
            temperature=self.cfg.temperature,
            tf32=self.tf32,
        )
        return mean * weight.sum()

    def _in_batch(self, head: RetrievalHead, users: Tensor, item: Tensor) -> Tensor:
        """[P]: against the other next items of the step, and those in memory.

        One that is there several times counts as often.

        Vectors in memory take no gradient. Were they in the loss of the items too, each item would
        be drawn to its users and hardly pushed from others, and all would end in one place. So with
        a memory the users learn from the loss with it, and the items from that of the step alone.
        """
        own, place, counts = torch.unique(item, return_inverse=True, return_counts=True)
        vectors = head.item_vectors(self._codes(self.item_codes[own]))
        users = users * head.score_scale
        if self.memory is None:
            return self._told_apart(users, vectors, item, place, vectors, own, counts)

        of_items = self._told_apart(users.detach(), vectors, item, place, vectors, own, counts)
        self.memory.match_moments(vectors)
        fixed = vectors.detach()
        of_users = self._told_apart(
            users,
            fixed,
            item,
            place,
            torch.cat([fixed, self.memory.vectors]),
            torch.cat([own, self.memory.codes]),
            torch.cat([counts, self.memory.counts]),
        )
        self.memory.keep_vectors(vectors, own, counts)
        # the second part is 0, and has a gradient
        return of_users + (of_items - of_items.detach())

    def _told_apart(
        self,
        users: Tensor,
        vectors: Tensor,
        item: Tensor,
        place: Tensor,
        others: Tensor,
        codes: Tensor,
        times: Tensor,
    ) -> Tensor:
        """[P]: of next items, whose vectors are `vectors[place]`, against the `others`.

        `codes` say which items these are, and `times` how often each counts. With the logQ
        correction (Yi et al., RecSys 2019, here on negatives alone) the sum over n of them stands
        for one over all items: item j has the weight count_j / (n · share_j).
        """
        score = (users * vectors[place]).sum(1)

        bias = times.to(users.dtype).log()
        if self.cfg.logq_correction:
            assert self.popularity is not None
            bias = bias - self.popularity[codes].log() - times.sum().to(users.dtype).log()

        total = chunked_log_partition(users, others, bias, codes, item)
        return torch.logaddexp(score, total) - score

    def _codes(self, codes: Tensor) -> Tensor:
        """The items' codes; as in the history, a share of the ids is read as unknown."""
        if self.id_dropout == 0:
            return codes
        ids, others = codes[:, :1], codes[:, 1:]
        dropped = torch.rand(ids.shape, device=ids.device) < self.id_dropout
        return torch.cat([ids.masked_fill(dropped, 0), others], dim=1)


def draw_by_share(share: Tensor, shape: tuple[int, int]) -> Tensor:
    """int64 numbers below len(share), with replacement, each as often as its share.

    share         .5  .3  .2
    running sum   .5  .8   1
    uniform .6 lies below the second: 1 is drawn
    """
    sums = share.cumsum(0)
    uniform = torch.rand(math.prod(shape), device=share.device) * sums[-1]
    return torch.searchsorted(sums, uniform, right=True).clamp(max=len(share) - 1).view(shape)

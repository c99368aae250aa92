"""Dense features of candidates: smoothed rates of the tasks' labels, in the training period and in
the user's own past.

They ride on candidates only, so that nothing in an encoded history depends on a request, and are
computed here for training, evaluation and serving alike. A training row reads the training period's
counts as of the last full step before its request: its own label, and what came later, is in none
of its features. After the training period, and in a saved model, the counts are the whole period's.

An order_only training row carries none of them, zeros: what was known at its time is not known.
Such rows also lie close to the ones before them, where a user's rates say more than they do about a
later request, and they are many.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.batches.counts import LabelCounts
from pipeline.batches.events import Events
from pipeline.batches.features import MS_PER_MINUTE, FeatureMaps
from pipeline.batches.labels import label_counts, rows_of_kind
from pipeline.config import DenseFeature, FeatureConfig

PACE = 2  # columns beside those of `features.dense`: how much history, and how long ago it ended
# log1p of a count, and log2 of a gap below, brought to about the size of a log-odds
COUNT_SCALE = 4.0
GAP_SCALE = 32.0


def dense_width(features: FeatureConfig, num_tasks: int) -> int:
    """F: per feature the log-odds of each task's rate over its base and one count; and the pace."""
    num_features = len(features.dense)
    if num_features == 0:
        return 0
    return num_features * (num_tasks + 1) + PACE


def candidate_features(
    seen: Events,
    targets: Events,
    visible: np.ndarray,
    maps: FeatureMaps,
    features: FeatureConfig,
    task_bits: Sequence[int],
) -> np.ndarray | None:
    """float32 [C, F], 0 for order_only candidates; None where the configuration names no feature.

    Args:
        seen: B histories, each whole up to what the last of its candidates sees.
        targets: the candidates of the B sequences, `event_time` that of their requests.
        visible: int64 [C], how many rows of its history each candidate sees, all strictly earlier
            than its request.
        task_bits: the bit of each task in an action mask.
    """
    if not features.dense:
        return None

    item_rows = maps.item_rows(targets.item_id)
    step = targets.event_time // (features.dense_step_minutes * MS_PER_MINUTE)
    own = _OwnPast(seen, targets, visible, maps, features, task_bits)

    columns = []
    for name, feature in features.dense.items():
        if feature.live:
            counts = own.count_visible(feature, item_rows)
        else:
            group = maps.groups(feature.by, item_rows, targets.request, features)
            counts = maps.counts[name].count_earlier(group, step)
        base = np.array(maps.row_rates[feature.rows])
        columns.append(rate_evidence(counts, base, feature.prior))

    values = np.concatenate([*columns, _pace(targets)], axis=1).astype(np.float32)
    return np.where(targets.order_only[:, None], np.float32(0), values)


def _pace(targets: Events) -> np.ndarray:
    """[C, PACE]: log1p of the rows before each candidate, log2 of the ms since the last of them."""
    since_last = np.log2(1 + np.maximum(targets.gap_ms, 0)) / GAP_SCALE
    gap = np.where(targets.gap_ms < 0, 0, since_last)  # NO_GAP is negative
    return np.stack([np.log1p(targets.position) / COUNT_SCALE, gap], axis=1)


def rate_evidence(counts: np.ndarray, base: np.ndarray, prior: float) -> np.ndarray:
    """[n, K + 1] from counts [n, 2 K]: log-odds of each smoothed rate over `base` [K], then how
    much was counted.

    A rate is (positive + prior · base) / (known + prior): without a known label it says nothing, a
    log-odds of 0. With K = 1, a base of 0.5 and a prior of 2:

        known, positive     rate                log-odds    log1p(known) / 4
        0      0            1 / 2    = 0.5      0           0
        8      6            7 / 10   = 0.7      0.85        0.55
    """
    base = np.clip(base, 1e-6, 1 - 1e-6)  # a task never or always seen in the training period
    values = np.empty((len(counts), len(base) + 1))
    most = np.zeros(len(counts), counts.dtype)

    for i, usual in enumerate(base):  # column by column: NumPy is slow along a short last axis
        known, positive = counts[:, i], counts[:, len(base) + i]
        rate = (positive + prior * usual) / (known + prior)
        values[:, i] = np.log(rate / (1 - rate)) - np.log(usual / (1 - usual))
        most = np.maximum(most, known)

    values[:, -1] = np.log1p(most) / COUNT_SCALE
    return values


def read_evidence(values: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `rate_evidence` was made of, from its [n, K + 1]: the smoothed rates [n, K], and the
    largest number of known labels behind them, [n].
    """
    base = np.clip(base, 1e-6, 1 - 1e-6)
    log_odds = values[:, :-1] + np.log(base / (1 - base))
    rates = 1 / (1 + np.exp(-log_odds))
    return rates, np.expm1(values[:, -1] * COUNT_SCALE)


class _OwnPast:
    """Counts over the rows of the candidate's own user that the candidate sees."""

    def __init__(
        self,
        seen: Events,
        targets: Events,
        visible: np.ndarray,
        maps: FeatureMaps,
        features: FeatureConfig,
        task_bits: Sequence[int],
    ) -> None:
        self.seen = seen
        self.targets = targets
        self.visible = visible
        self.maps = maps
        self.features = features
        self.user = np.repeat(np.arange(len(targets.lengths)), targets.lengths)
        self.labels = label_counts(seen.action_mask, seen.known_mask, task_bits)

    def count_visible(self, feature: DenseFeature, item_rows: np.ndarray) -> np.ndarray:
        """int64 [C, 2 K]: labels known and positive in the rows that agree with the candidate in
        the feature's columns.

        A candidate of item A that sees four rows of its history, two of them too old:

            row of the history      0   1   2   3   4
            item                    A   B   A   B   A
            the candidate sees      x   x   x   x           visible = 4
            within_minutes                  x   x   x       older = 2
            by user and item_id             x
            by user                         x   x

        Both cases are a sum over the rows before `visible` less one over the rows before `older`.
        """
        chosen = rows_of_kind(self.seen.order_only, feature.rows)
        older = self._older(feature.within_minutes)

        by = [name for name in feature.by if name != "user"]
        if by:
            return self._count_alike(by, item_rows, chosen, older)
        return self._count_all(chosen, older)

    def _count_all(self, chosen: np.ndarray, older: np.ndarray) -> np.ndarray:
        """Every row agrees: sums along the history, without sorting anything."""
        before = np.zeros((len(self.labels) + 1, self.labels.shape[1]), np.int64)
        np.cumsum(self.labels & chosen[:, None], 0, out=before[1:])

        first = self.seen.offsets[self.user]
        return before.take(first + self.visible, axis=0) - before.take(first + older, axis=0)

    def _count_alike(
        self, by: list[str], item_rows: np.ndarray, chosen: np.ndarray, older: np.ndarray
    ) -> np.ndarray:
        """The rows with the candidate's values in the columns `by`: counted by user and group, with
        the place in the history as time.
        """
        seen, features = self.seen, self.features
        seen_items = self.maps.item_rows(seen.item_id)
        seen_user = np.repeat(np.arange(len(seen.lengths)), seen.lengths)
        place = np.arange(len(seen_user)) - seen.offsets[seen_user]

        # 0: a value that the maps do not know, which agrees with nothing
        group = self.maps.groups(by, item_rows, self.targets.request, features)
        seen_group = self.maps.groups(by, seen_items, seen.request, features)
        chosen = chosen & (seen_group > 0)

        # one number for a user and a group
        size = 1 + max(group.max(initial=0), seen_group.max(initial=0))
        owned = seen_user * size + seen_group
        asked = self.user * size + group

        past = LabelCounts.from_rows(owned[chosen], place[chosen], self.labels[chosen])
        return past.count_earlier(asked, self.visible) - past.count_earlier(asked, older)

    def _older(self, within_minutes: float | None) -> np.ndarray:
        """int64 [C]: the rows of a candidate's history that are older than so many minutes at its
        request, at most those that it sees.

        A user's times do not fall, so users one after another, each a span apart, are one sorted
        list, and one search finds where every candidate's window begins:

            user                 0   0   0   1   1
            time                 5   7   9   6   8      earliest = 5, span = 5
            sorted list          0   2   4   6   8
            a candidate of user 1, window from 7: 1 * 5 + 7 - 5 = 7, place 4, less offset 3: 1
        """
        time, lengths = self.seen.event_time, self.seen.lengths
        if within_minutes is None or len(time) == 0:
            return np.zeros_like(self.visible)

        since = self.targets.event_time - int(within_minutes * MS_PER_MINUTE)
        earliest = min(int(time.min()), int(since.min()))
        span = max(int(time.max()), int(since.max())) - earliest + 1

        rows = np.repeat(np.arange(len(lengths)), lengths) * span + (time - earliest)
        begin = np.searchsorted(rows, self.user * span + (since - earliest))
        begin -= self.seen.offsets[self.user]
        return np.minimum(begin, self.visible)

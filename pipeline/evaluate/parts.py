"""The work of an evaluation in parts, each some users of one bucket, that any process can score.

    model folder + sequences → `plan_parts` → `score_part`, anywhere, in any order → `PartScores`

A part is cut by the store alone, and its predictions are in the order of the store, so the whole is
the same whichever workers score it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.events import offsets_of, ranges
from pipeline.batches.examples import (
    Examples,
    UserEvents,
    request_examples,
    request_passes,
    user_events,
)
from pipeline.batches.loader import (
    EvaluationBatch,
    evaluation_batch,
    split_bounds,
    token_batches,
)
from pipeline.config import ChannelConfig, ExampleConfig, ModelConfig, RunConfig, SplitConfig
from pipeline.evaluate.asked import asked_items
from pipeline.evaluate.item_rates import ItemCounts, count_items
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.model.flops import Flops
from pipeline.model.heads import HeadMetrics
from pipeline.model.inference.quantize import quantize_tables
from pipeline.model.inference.shared_scoring import encode_shared, shared_form
from pipeline.model.ranker import RankingModel
from pipeline.model.work import count_work
from pipeline.sequences import store

ROWS_OF_A_PART = 250_000  # of the store: a second or two of work, and little memory
MOST_TARGETS = 4096  # candidates of one pass over a user's rows
COUNTED_TOKENS = 2**20  # tokens whose lengths are counted at once


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """What all parts of an evaluation have in common. Small: it goes to every worker.

    `cfg` has the tasks, actions and features of the model.
    """

    cfg: RunConfig
    model_dir: Path
    digest: str  # of the model's index, so that a worker does not go on with another
    splits: tuple[str, ...]
    device: str
    spread: bool = False  # over the workers of the cluster
    with_vectors: bool = False  # of the users whom retrieval is going to be asked about


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """Users `first` .. `last - 1` of a bucket, in its order."""

    bucket: int
    first: int
    last: int
    rows: int  # of the store, about


@dataclass(frozen=True, slots=True)
class SplitScores:
    """The scored candidates of one split.

    `predictions` has a row per candidate, in the order of the store: user_id, item_id, event_time,
    history_rows (rows of the user before the request), user_is_new (no row in the training period),
    and what the model's head says (`RankingHead.prediction_columns`).
    """

    predictions: pa.Table
    metrics: HeadMetrics

    def named_metrics(self, split: str) -> dict[str, float]:
        """`val/ne/is_click` and so on."""
        return {f"{split}/{name}": value for name, value in self.metrics.result().items()}


@dataclass(frozen=True, slots=True)
class UserVectors:
    """Some users as `RetrievalHead.user_vectors` has them, at the place where their history ends.

    user_id     3    7       find([7, 5, 7])
    vectors    .1   .9       .9 0 .9
    """

    user_id: np.ndarray  # int64 [U], sorted
    vectors: Tensor  # float32 [U, d], on the CPU

    def find(self, user_id: np.ndarray) -> Tensor:
        """[n, d]; zeros for a user who is not there, who has no history."""
        place = np.searchsorted(self.user_id, user_id)
        padded = np.append(self.user_id, -1)
        is_there = torch.from_numpy(padded[place] == user_id)
        rows = torch.nn.functional.pad(self.vectors, (0, 0, 0, 1))[torch.from_numpy(place)]
        return rows * is_there[:, None]


@dataclass(frozen=True, slots=True)
class PartScores:
    """What a part adds to the whole."""

    splits: dict[str, SplitScores]
    work: dict[str, Flops]  # by split
    item_counts: ItemCounts
    vectors: dict[str, UserVectors]  # by split; none where they were not asked for


def plan_parts(manifest: store.Manifest) -> list[EvaluationPart]:
    """Buckets, and large ones in ranges of users."""
    parts = []
    for bucket, entry in enumerate(manifest.buckets):
        num_parts = max(1, min(-(-entry.rows // ROWS_OF_A_PART), entry.users))
        bounds = np.linspace(0, entry.users, num_parts + 1).astype(int).tolist()
        for first, last in pairwise(bounds):
            parts.append(EvaluationPart(bucket, first, last, entry.rows // num_parts))
    return parts


def load_for(job: EvaluationJob) -> LoadedModel:
    """The job's model on its device; a process keeps the last one for its next part."""
    return _load(job.model_dir, job.digest, job.device, job.cfg.evaluate.int4_tables)


@lru_cache(maxsize=1)
def _load(model_dir: Path, digest: str, device: str, int4: bool) -> LoadedModel:
    loaded = load_model(model_dir, device)
    if int4:
        quantize_tables(loaded.model)
    return loaded


def score_part(job: EvaluationJob, part: EvaluationPart) -> PartScores:
    """Score the candidates of a part's users once, in every split of the job."""
    return score_users(job.cfg, load_for(job), job.splits, part, with_vectors=job.with_vectors)


def score_users(
    cfg: RunConfig,
    loaded: LoadedModel,
    splits: Sequence[str],
    part: EvaluationPart,
    *,
    with_vectors: bool = False,
) -> PartScores:
    """The same with a model at hand, on the device that it is on."""
    manifest = store.read_manifest(cfg.sequence_dir)
    sequences = store.read_bucket(cfg.sequence_dir, manifest, part.bucket)
    sequences = sequences.slice(part.first, part.last - part.first)
    users = user_events(sequences, cfg.source, cfg.features)

    if cfg.evaluate.sample is not None:
        chosen = sampled_users(users.user_id, cfg.evaluate.sample, cfg.seed)
        users = user_events(sequences.filter(pa.array(chosen)), cfg.source, cfg.features)

    bounds = {split: split_bounds(cfg.split, split) for split in splits}
    histories: dict[str, Examples] = {}
    if with_vectors:
        for split, period in bounds.items():
            asked = asked_items(users, period, cfg.evaluate, loaded.cfg.positive_bits, loaded.maps)
            histories[split] = asked.examples
    scores, vectors = _score_periods(cfg, loaded, users, bounds, histories)

    work: dict[str, Flops] = {}
    for split, period in bounds.items():
        requests = request_examples(users, *period, cfg.examples.max_history)
        work[split] = count_requests(users, requests, cfg)
    counts = count_items(users, cfg.split, cfg.task_bits, cfg.examples.negatives)
    return PartScores(scores, work, counts, vectors)


def sampled_users(user_id: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: about this share of the users, the same ones in every store and split.

    Decided by a hash of user and seed (splitmix64), so a part needs to know of no other.
    """
    with np.errstate(over="ignore"):
        x = user_id.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x < np.uint64(min(int(share * 2**64), 2**64 - 1))


@torch.no_grad()
def _score_periods(
    cfg: RunConfig,
    loaded: LoadedModel,
    users: UserEvents,
    bounds: Mapping[str, tuple[int, int]],
    histories: Mapping[str, Examples],
) -> tuple[dict[str, SplitScores], dict[str, UserVectors]]:
    """The scores of each period, [from, to) in ms UTC, all from one pass over the users' rows; and
    the vectors of users at the ends of these `histories`.

    A history that requests share is encoded once for the periods too, which follow each other.
    """
    if not bounds:
        return {}, {}
    model, head = loaded.model, loaded.model.heads
    where = next(model.parameters()).device
    bf16 = cfg.evaluate.precision == "bf16"
    half = torch.autocast(where.type, torch.bfloat16, enabled=bf16)
    # a history that moves on with each request is no shared one
    shared = shared_form(cfg.model) != "none" and cfg.examples.max_history is None

    begin = min(first for first, _ in bounds.values())
    end = max(last for _, last in bounds.values())
    asked = _asked_together(users, (begin, end), cfg.examples.max_history, shared=shared)
    ends = _HistoryEnds(histories, asked, users.user_id)
    found = {split: _Collected(head.new_metrics()) for split in bounds}

    # a batch of no request at last: without any other, it gives the columns
    nothing = _no_examples()
    for examples in (*token_batches(asked, cfg.evaluate.batch_tokens), nothing):
        part = evaluation_batch(users, examples, loaded.maps, cfg, shared=shared)
        outputs = torch.zeros(0, len(cfg.tasks))
        if len(examples):
            who, batch = ends.ask(part.batch, examples)
            with half:
                outputs, rows = _outputs(model, batch.to(where), cfg.model, shared=shared)
                if rows is not None and model.retrieval is not None:
                    ends.add(who, model.retrieval.user_vectors(rows))
            outputs = outputs.cpu()

        for split, (first, last) in bounds.items():
            inside = np.flatnonzero((part.event_time >= first) & (part.event_time < last))
            chosen, own = part.select(inside), outputs[torch.from_numpy(inside)]
            columns = _candidate_columns(chosen, cfg.examples)
            columns |= head.prediction_columns(own, chosen)
            found[split].add(own, chosen, columns)

    scores = {}
    for split, collected in found.items():
        scores[split] = _in_store_order(collected, users, cfg.split)
    return scores, ends.vectors()


def _outputs(
    model: RankingModel, batch: SequenceBatch, cfg: ModelConfig, *, shared: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of the candidates, and rows before the batch's next items where it has any."""
    if not shared:
        return model(batch), None
    encoded = encode_shared(model, batch, cfg)
    return model.score_rows(encoded.candidate_rows, batch), encoded.next_rows


@dataclass(frozen=True, slots=True)
class _AskedEnds:
    """Whose histories end at the next items of a batch, int64 [P] each."""

    split: np.ndarray  # its number
    user_id: np.ndarray


class _HistoryEnds:
    """The ends of users' histories, each asked for in the newest of the user's passes, as the row
    before a next item.

    Args:
        histories: by split, of the users that the split asks about; of no split, nothing is asked.
        passes: those that are going to be encoded.
    """

    def __init__(
        self, histories: Mapping[str, Examples], passes: Examples, user_id: np.ndarray
    ) -> None:
        self._splits = list(histories)
        self._user_id = user_id
        self._found: list[tuple[_AskedEnds, Tensor]] = []

        # int64 [splits, users]: the row behind the history's last; 0 where it is not asked for
        self._end = np.zeros((len(histories), len(user_id)), np.int64)
        for number, examples in enumerate(histories.values()):
            self._end[number, examples.user] = examples.history_end
        self._newest = np.zeros(len(user_id), np.int64)
        np.maximum.at(self._newest, passes.user, passes.target_end)

    def ask(
        self, batch: SequenceBatch, examples: Examples
    ) -> tuple[_AskedEnds | None, SequenceBatch]:
        """The batch of these passes with a next item behind each history that ends in one.

        ends in val, test    3, 5 | none, 4      two passes
        num_next             2 1
        next_visible         3 5 4
        """
        if not self._splits:
            return None, batch
        end = self._end[:, examples.user].T - examples.history_begin[:, None]
        is_newest = examples.target_end == self._newest[examples.user]
        is_asked = (end > 0) & is_newest[:, None]
        example, split = np.nonzero(is_asked)
        asked = replace(
            batch,
            num_next=torch.from_numpy(is_asked.sum(1).astype(np.int32)),
            next_visible=torch.from_numpy(end[is_asked].astype(np.int32)),
        )
        return _AskedEnds(split, self._user_id[examples.user[example]]), asked

    def add(self, who: _AskedEnds | None, vectors: Tensor) -> None:
        """The vectors of a batch of `ask`, [P, d]."""
        assert who is not None
        self._found.append((who, vectors.float().cpu()))

    def vectors(self) -> dict[str, UserVectors]:
        """Those of each split; a split in which nobody was asked for has none."""
        found = {}
        for number, name in enumerate(self._splits):
            users, vectors = [], []
            for who, rows in self._found:
                of_split = who.split == number
                users.append(who.user_id[of_split])
                vectors.append(rows[torch.from_numpy(of_split)])
            if users:
                found[name] = join_vectors(np.concatenate(users), torch.cat(vectors))
        return found


def join_vectors(user_id: np.ndarray, vectors: Tensor) -> UserVectors:
    """`UserVectors` of users in any order."""
    order = np.argsort(user_id)
    return UserVectors(user_id[order], vectors[torch.from_numpy(order)])


@dataclass
class _Collected:
    """The scored candidates of one period so far."""

    metrics: HeadMetrics
    tables: list[pa.Table] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)  # of the users' events

    def add(self, outputs: Tensor, part: EvaluationBatch, columns: dict[str, pa.Array]) -> None:
        self.metrics.add(outputs.numpy(), part)
        self.tables.append(pa.table(columns))
        self.rows.append(part.rows)


def _in_store_order(found: _Collected, users: UserEvents, split: SplitConfig) -> SplitScores:
    """The candidates in the order of the store, with what is known of their users."""
    in_store = np.concatenate(found.rows)
    order = np.argsort(in_store, kind="stable")
    predictions = pa.concat_tables(found.tables).take(pa.array(order))
    for name, values in _user_columns(users, in_store[order], split).items():
        predictions = predictions.append_column(name, pa.array(values))
    return SplitScores(predictions.combine_chunks(), found.metrics)


def _asked_together(
    users: UserEvents, bounds: tuple[int, int], max_history: int | None, *, shared: bool
) -> Examples:
    """The requests within `bounds` (ms), each alone or many over one history."""
    if shared:
        return request_passes(users, *bounds, MOST_TARGETS)
    return request_examples(users, *bounds, max_history)


def _no_examples() -> Examples:
    nothing = np.zeros(0, np.int64)
    return Examples(nothing, nothing, nothing, nothing, nothing)


def _candidate_columns(part: EvaluationBatch, examples: ExampleConfig) -> dict[str, pa.Array]:
    columns = {
        "user_id": pa.array(part.user_id),
        "item_id": pa.array(part.item_id),
        "event_time": pa.array(part.event_time),
    }
    if examples.negatives:
        columns["drawn"] = pa.array(part.drawn)
    return columns


def _user_columns(users: UserEvents, rows: np.ndarray, split: SplitConfig) -> dict[str, np.ndarray]:
    """What slices need to know of the user of each candidate, the rows `rows` of `users`."""
    user = users.row_user[rows]
    first = users.events.offsets[:-1][user]
    trained_before = offsets_of(users.request_time < split.train_end_ms)
    num_trained = np.diff(trained_before[users.events.offsets])
    return {
        "history_rows": users.first_position[user] + users.visible_end[rows] - first,
        "user_is_new": num_trained[user] == 0,
    }


def count_requests(users: UserEvents, examples: Examples, cfg: RunConfig) -> Flops:
    """The work of these requests, each alone in its sequence as serving has it."""
    work = Flops()
    for part in token_batches(examples, COUNTED_TOKENS):
        work.add(count_work(_lengths_alone(users, part, cfg.model.channels), cfg))
    return work


def _lengths_alone(
    users: UserEvents, examples: Examples, channels: Mapping[str, ChannelConfig]
) -> SequenceBatch:
    """A batch to count the work of: lengths, and where a channel filters rows, their actions."""
    num_targets = examples.target_end - examples.target_begin
    offsets = torch.from_numpy(offsets_of(examples.num_tokens))
    num_tokens = int(offsets[-1])
    empty = torch.zeros(1, dtype=torch.int32).expand(num_tokens)

    action_mask, known_mask = empty, empty
    if any(channel.actions for channel in channels.values()):
        # candidates carry no action, but a filter lets them through
        rows, _ = ranges(examples.history_begin, examples.history_begin + examples.num_tokens)
        rows = np.minimum(rows, len(users.events.item_id) - 1)
        action_mask = torch.from_numpy(users.events.action_mask[rows])
        known_mask = torch.from_numpy(users.events.known_mask[rows])

    return SequenceBatch(
        seq_offsets=offsets,
        num_targets=torch.from_numpy(num_targets.astype(np.int32)),
        item_codes=empty[:, None],
        request_codes=empty[:, None],
        action_mask=action_mask,
        known_mask=known_mask,
        position=torch.zeros(1, dtype=torch.int64).expand(num_tokens),
        gap_ms=empty,
        user_codes=empty[:0, None],
        max_seq_len=int(examples.num_tokens.max(initial=0)),
    )

"""Training for retrieval: which events are asked for, from where, and that none sees itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.example_batches import example_batch, history_batch
from pipeline.batches.examples import UserEvents, user_events, whole_examples
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.model.artifact import load_model, save_model
from pipeline.model.encoders import check_run
from pipeline.model.ranker import RankingModel
from pipeline.model.work import count_work
from pipeline.sequences import store
from pipeline.train import loop
from pipeline.train.next_item import NextItemLoss
from pipeline.train.trainee import Trainee
from tests.worlds.tiny import publish_sequences, tiny_config
from tests.worlds.training import rows_told_and_found

PLAIN = {"request": {"tab": {"dim": 2}}}
CAUSAL = {"window": None, "scaling_seq_len": 16}
SEMI_LOCAL = {"window": 2, "full_rows": 2, "extra_prefix": 1, "scaling_seq_len": 16}
ENCODERS = {
    "semi-local": {"attention": SEMI_LOCAL},
    "truncated": {"attention": SEMI_LOCAL, "truncate_after_layer": 1, "truncate_to": 8},
    "two tokens": {"attention": CAUSAL, "merge": False},
    "channels": {"channels": {"all": {"attention": CAUSAL}, "new": {"max_len": 8}}},
    "hstu": {"encoder": "hstu", "attention": CAUSAL},
    "hstu_merged": {"encoder": "hstu_merged", "attention": CAUSAL, "relative_bias": True},
    "transformer": {"encoder": "transformer", "attention": CAUSAL},
    "sasrec": {"encoder": "sasrec", "attention": CAUSAL},
    "fuxi_alpha": {"encoder": "fuxi_alpha", "attention": CAUSAL},
    "fuxi_beta": {"encoder": "fuxi_beta", "attention": CAUSAL},
    "lares": {"encoder": "lares", "attention": CAUSAL, "loop": {"steps": 2}},
}
each_encoder = pytest.mark.parametrize("model", ENCODERS.values(), ids=ENCODERS)


def retrieval_config(folder: Path, model: dict | None = None, **sections: dict) -> RunConfig:
    small = {"d_model": 16, "d_qk": 8, "d_v": 8, "dropout": 0.0, "head_hidden": 8}
    given = {
        "features": PLAIN,
        "model": small | {"attention": CAUSAL} | (model or {}),
        "train": {"max_targets_per_sequence": 6, "warmup_steps": 2},
        "retrieval": {"enabled": True, "dim": 8},
        "tasks": [],
    }
    return tiny_config(folder, **given | sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    publish_sequences(retrieval_config(folder))
    return folder


@pytest.fixture(scope="module")
def users(folder: Path) -> UserEvents:
    cfg = retrieval_config(folder)
    return user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)


@pytest.fixture(scope="module")
def maps(folder: Path) -> FeatureMaps:
    return fit_features(retrieval_config(folder, tasks=["is_click", "is_like"]))


def training_batch(users: UserEvents, maps: FeatureMaps, cfg: RunConfig) -> SequenceBatch:
    examples = whole_examples(users, cfg.split, cfg.train)
    return example_batch(users, examples, maps, cfg, training=True)


def make_model(cfg: RunConfig, maps: FeatureMaps) -> RankingModel:
    torch.manual_seed(0)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def asked_events(users: UserEvents, cfg: RunConfig, bits: int) -> list[tuple[int, int]]:
    """Each target of the passes, in order, that counts: its row, and the rows that lie before its
    request."""
    examples = whole_examples(users, cfg.split, cfg.train)
    found = []
    for i in range(len(examples)):
        for row in range(examples.target_begin[i], examples.target_end[i]):
            visible = users.visible_end[row] - examples.history_begin[i]
            events = users.events
            passes = bits == 0 or events.action_mask[row] & events.known_mask[row] & bits
            if visible > 0 and passes:
                found.append((row, visible))
    return found


@pytest.mark.parametrize(("positives", "bits"), [([], 0), (["is_like"], 2)])
def test_an_event_is_asked_for_from_the_row_before_its_request(
    folder: Path, users: UserEvents, maps: FeatureMaps, positives: list[str], bits: int
) -> None:
    cfg = retrieval_config(folder, retrieval={"enabled": True, "positives": positives})
    batch = training_batch(users, maps, cfg)
    expected = asked_events(users, cfg, bits)
    assert batch.num_next is not None and batch.next_code is not None
    assert batch.next_visible is not None and batch.next_weight is not None

    rows, visible = map(list, zip(*expected, strict=True))
    assert batch.next_visible.tolist() == visible
    assert int(batch.num_next.sum()) == len(rows)
    assert maps.item_ids[batch.next_code - 1].tolist() == users.events.item_id[rows].tolist()
    light = users.events.order_only[rows]
    assert batch.next_weight.tolist() == np.where(light, np.float32(0.3), 1).tolist()
    assert batch.num_targets.sum() == 0  # nothing is scored


def next_rows(model: RankingModel, batch: SequenceBatch) -> Tensor:
    rows = model.encode(batch).next_rows
    assert rows is not None
    return rows


@each_encoder
def test_no_next_item_is_seen_from_where_it_is_asked_for(
    folder: Path, users: UserEvents, maps: FeatureMaps, model: dict
) -> None:
    """Whatever a user does from a request on, the rows before it stay as they are."""
    cfg = retrieval_config(folder, model)
    encoder = make_model(cfg, maps)
    before = next_rows(encoder, training_batch(users, maps, cfg))
    asked = asked_events(users, cfg, 0)

    rng = np.random.default_rng(0)
    for number in rng.permutation(len(asked))[:6].tolist():
        row, _ = asked[number]
        begin = int(users.visible_end[row])
        end = int(users.events.offsets[users.row_user[row] + 1])
        changed = change_rows(users, begin, end)
        after = next_rows(encoder, training_batch(changed, maps, cfg))
        assert torch.equal(after[number], before[number])
        # and the change shows where its events are history
        later = [i for i, (other, _) in enumerate(asked) if begin < users.visible_end[other] <= end]
        assert all((after[i] != before[i]).any() for i in later)


def change_rows(users: UserEvents, begin: int, end: int) -> UserEvents:
    """The same requests with other items, actions and surfaces in the rows begin..end-1."""
    events = users.events
    item_id, action = events.item_id.copy(), events.action_mask.copy()
    tab = events.request["tab"].copy()
    item_id[begin:end] = (item_id[begin:end] + 7) % 60
    action[begin:end] ^= 3
    tab[begin:end] = (tab[begin:end] + 1) % 3
    changed = replace(events, item_id=item_id, action_mask=action, request={"tab": tab})
    return replace(users, events=changed)


@pytest.mark.parametrize("name", ["hstu", "hstu_merged", "transformer", "sasrec", "two tokens"])
def test_the_row_before_a_request_is_the_newest_of_its_history(
    folder: Path, users: UserEvents, maps: FeatureMaps, name: str
) -> None:
    """A row of a pass is what serving encodes of the same history alone."""
    cfg = retrieval_config(folder, ENCODERS[name])
    model = make_model(cfg, maps)
    rows = next_rows(model, training_batch(users, maps, cfg))

    whole = whole_examples(users, cfg.split, cfg.train)
    for number, (row, visible) in list(enumerate(asked_events(users, cfg, 0)))[::17]:
        user = users.row_user[row]
        begin = users.visible_end[row] - visible
        example = replace(
            whole[:1],
            user=np.array([user]),
            history_begin=np.array([begin]),
            history_end=np.array([begin + visible]),
        )
        encoded = model.encode(history_batch(users, example, maps, cfg.inputs), last_history=True)
        assert encoded.last_history_row is not None
        torch.testing.assert_close(encoded.last_history_row[0], rows[number])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("head", [{}, {"score": "dot", "item_tower": "linear"}])
def test_the_full_softmax_is_cross_entropy_over_the_items_of_training(
    folder: Path, users: UserEvents, maps: FeatureMaps, head: dict, smoothing: float
) -> None:
    section = {"enabled": True, "dim": 8, "label_smoothing": smoothing} | head
    cfg = retrieval_config(folder, retrieval=section)
    model, batch = make_model(cfg, maps), training_batch(users, maps, cfg)
    assert batch.next_code is not None and batch.next_weight is not None
    encoded = model.encode(batch)
    loss, weight = NextItemLoss(cfg.retrieval, maps, "cpu")(model, encoded, batch)

    assert model.retrieval is not None and encoded.next_rows is not None
    seen = torch.from_numpy(maps.item_codes[maps.item_codes[:, 0] > 0])
    items = model.retrieval.item_vectors(seen)
    scores = model.retrieval.user_vectors(encoded.next_rows) @ items.T
    if not head:
        torch.testing.assert_close(items.norm(dim=1), items.new_ones(len(items)))
        scores = scores / 0.05
    losses = torch.nn.functional.cross_entropy(
        scores, batch.next_code - 1, reduction="none", label_smoothing=smoothing
    )
    expected = (losses * batch.next_weight).sum().view(1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight, batch.next_weight.sum().view(1))


class Repeated:
    """The same batch in every step."""

    steps_per_epoch = 12

    def __init__(self, batch: SequenceBatch) -> None:
        self.batch = batch

    def batches(self, epoch: int, first_step: int = 0):
        for _ in range(first_step, self.steps_per_epoch):
            yield self.batch


@pytest.mark.parametrize("tasks", [[], ["is_click", "is_like"]], ids=["alone", "joint"])
def test_training_lowers_the_loss_and_the_artifact_finds_the_same_items(
    folder: Path, users: UserEvents, maps: FeatureMaps, tasks: list[str], tmp_path: Path
) -> None:
    train = {"epochs": 1, "log_every": 4, "warmup_steps": 2, "max_targets_per_sequence": 6}
    cfg = retrieval_config(folder, tasks=tasks, train=train)
    batch = training_batch(users, maps, cfg)
    lines: list[dict[str, float]] = []
    model = loop.train(
        cfg, maps, Repeated(batch), "data", log=lambda step, values: lines.append(values)
    ).eval()

    names = {name for name in lines[0] if name.startswith("train/loss/")}
    assert names == {f"train/loss/{name}" for name in [*tasks, "next_item"]}
    assert lines[-1]["train/loss/next_item"] < lines[0]["train/loss/next_item"] - 0.1

    save_model(tmp_path / "model", model, cfg, maps, {})
    loaded = load_model(tmp_path / "model").model
    codes = torch.from_numpy(maps.item_codes)
    assert model.retrieval is not None and loaded.retrieval is not None
    assert torch.equal(loaded.retrieval.item_vectors(codes), model.retrieval.item_vectors(codes))


@pytest.mark.parametrize(
    "loss",
    [{"loss": "uniform"}, {"loss": "popularity"}, {"loss": "in_batch", "memory": "axbn"}],
    ids=["uniform", "popularity", "in_batch"],
)
def test_sampled_losses_train_too(
    folder: Path, users: UserEvents, maps: FeatureMaps, loss: dict
) -> None:
    # vectors in memory move a step behind the model, so that with it the loss rises at first
    train = {"epochs": 2, "log_every": 4, "warmup_steps": 2, "max_targets_per_sequence": 6}
    section = {"enabled": True, "dim": 8, "negatives": 16} | loss
    cfg = retrieval_config(folder, train=train, retrieval=section)
    lines: list[dict[str, float]] = []
    loader = Repeated(training_batch(users, maps, cfg))
    loop.train(cfg, maps, loader, "data", log=lambda step, values: lines.append(values))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1


@pytest.mark.parametrize(
    "loss",
    [{"loss": "full", "align_trajectories": 0.1}, {"loss": "uniform", "negatives": 2}],
    ids=["twice", "uniform"],
)
def test_the_ranks_are_told_of_the_items_that_are_told_apart(
    folder: Path, users: UserEvents, maps: FeatureMaps, loss: dict
) -> None:
    """More than the batch's own, and those of a second pass."""
    section = {"enabled": True, "dim": 8} | loss
    cfg = retrieval_config(folder, ENCODERS["lares"], retrieval=section)
    trainee = Trainee(cfg, maps, "cpu", 0, 2)
    told, found = rows_told_and_found(trainee, training_batch(users, maps, cfg))
    assert torch.equal(told, found)


def test_a_joint_run_scores_candidates_as_the_tasks_alone_would(
    folder: Path, users: UserEvents, maps: FeatureMaps
) -> None:
    joint = retrieval_config(folder, tasks=["is_click"])
    alone = replace(joint, retrieval=config.RetrievalConfig())
    with_next, without = training_batch(users, maps, joint), training_batch(users, maps, alone)
    assert without.next_code is None

    models = make_model(joint, maps), make_model(alone, maps)
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    assert torch.equal(models[0](with_next), models[1](without))

    # 16 numbers of an id and 2 of a tab, through a hidden layer of 32 to 16 and to 8
    assert with_next.next_code is not None
    # where every row is made: else the last layer has those before the next items more
    on_gpu = replace(joint.train, use_gpu=True)
    joint, alone = replace(joint, train=on_gpu), replace(alone, train=on_gpu)
    work = count_work(with_next, joint, num_items=50).flops - count_work(without, alone).flops
    of_items = 50 * (18 * 32 + 32 * 16 + 16 * 8)
    of_users = len(with_next.next_code) * (16 * 8 + 50 * 8)
    assert work == 2 * (of_items + of_users)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"retrieval": {"enabled": True, "positives": ["buy"]}}, "retrieval.positives"),
        ({"retrieval": {"enabled": False}}, "tasks must be at least one action without"),
        ({"train": {"validate_every": 5}}, "train.validate_every must be 0"),
        ({"train": {"tables": {"item_id": "sharded"}}}, "train.tables.item_id must be replicated"),
        ({"train": {"bf16_tables": ["item_id"]}}, "train.bf16_tables must be empty"),
        ({"features": {"dense": {"item": {"by": ["item_id"]}}}}, "features.dense must be empty"),
    ],
)
def test_impossible_settings_are_refused_by_name(
    tmp_path: Path, sections: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        retrieval_config(tmp_path, **sections)


def test_an_encoder_without_history_rows_is_refused(folder: Path) -> None:
    cfg = retrieval_config(folder, {"encoder": "din"})
    with pytest.raises(ConfigError, match=r"model.encoder must be an encoder with history rows"):
        check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)


def test_a_table_too_large_to_be_whole_is_refused(folder: Path, maps: FeatureMaps) -> None:
    train = {"max_targets_per_sequence": 6, "num_workers": 2, "shard_above_mb": 0}
    cfg = retrieval_config(folder, train=train)
    with pytest.raises(UserError, match=r"train.tables: item_id is sharded"):
        Trainee(cfg, maps, "cpu", 0, 2)

"""Batches filled up to one of few sizes, and steps that are replayed from graphs made for them."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.training.model import model_config, random_batch, vocabulary
from kernels.semi_local_attention.tile_table import LONG_SEQUENCE
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.filling import BatchFiller, length_bound, next_multiple, next_size
from pipeline.batches.graphs import IDLE_BATCHES, BatchGraphs
from pipeline.config import ConfigError, RunConfig
from pipeline.model.encoders.stu import STU
from pipeline.model.flops import Flops
from pipeline.model.tokens import Tokens
from pipeline.train import graphs
from pipeline.train.checkpoint import TrainState
from pipeline.train.loader_process import messages
from pipeline.train.meter import Meter, fill_batches
from pipeline.train.trainee import Trainee
from tests.support.graphs import capture_none
from tests.support.ranks import run_ranks

LENGTHS = 50, 7, 33, 12, 1
BANDED = {"window": 8, "full_rows": 6}
TRUNCATED = {"attention": BANDED, "truncate_after_layer": 1, "truncate_to": 20}
MODELS = {
    "truncated": TRUNCATED,
    "whole": {"attention": BANDED},
    "merged, biased": {
        "encoder": "hstu_merged",
        "attention": {"window": None},
        "relative_bias": True,
    },
}


def small_config(model: dict, dropout: float = 0.0, **train: object) -> RunConfig:
    cfg = model_config({"dropout": dropout, **model}, layers=3, heads=2, width=8)
    return replace(cfg, train=replace(cfg.train, precision="fp32", **train))


def ragged_batch(
    cfg: RunConfig, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, *, shared: bool = False
) -> SequenceBatch:
    """Users of these lengths with 3 candidates each, with `shared` of three requests."""
    users = [random_batch(cfg, n, n, 3, seed + number) for number, n in enumerate(lengths)]
    columns = {}
    for name in users[0].tensors:
        columns[name] = torch.cat([getattr(user, name) for user in users])
    columns["seq_offsets"] = torch.tensor([0, *accumulate(n + 3 for n in lengths)])
    if shared:
        seen = [[max(n - 4, 1), max(n - 2, 1), n] for n in lengths]
        columns["target_visible"] = torch.tensor(seen, dtype=torch.int32).flatten()
        columns["target_span"] = torch.tensor([min(4, n - 1) for n in lengths], dtype=torch.int32)
    return replace(users[0], max_seq_len=max(lengths) + 3, **columns)


def make_trainee(cfg: RunConfig) -> Trainee:
    torch.manual_seed(0)
    return Trainee(cfg, vocabulary(cfg), "cpu", rank=0, world_size=1)


def test_sizes_are_evenly_spaced_in_an_octave():
    assert [next_size(count, 4) for count in (1, 7, 8, 9, 13, 17, 33)] == [1, 7, 8, 10, 14, 20, 40]
    assert next_size(196_800, 64) == 198_656
    assert [next_multiple(count, 64) for count in (0, 1, 5, 64, 65)] == [0, 1, 8, 64, 128]
    assert next_multiple(5, 0) == 5


def test_a_bound_of_lengths_lies_where_tiles_change():
    found = [length_bound(longest) for longest in (3, 1024, 1025, LONG_SEQUENCE, 8193, 70_000)]
    assert found == [1024, 1024, 8192, LONG_SEQUENCE, 65_536, 524_288]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_filled_batch_trains_as_the_batch_itself(name: str, shared: bool):
    """Two steps, so that the optimizers' moments count too: of no table row that only fills."""
    cfg = small_config(MODELS[name], graph_sizes=16)
    batch = ragged_batch(cfg, shared=shared)
    filled = BatchFiller.of_run(cfg).fill(batch)
    assert filled.num_tokens > batch.num_tokens == filled.own_tokens
    if name == "truncated":  # less of it is kept than of a sequence of the batch
        assert filled.target_span is not None
        assert filled.target_span[batch.num_sequences] < 0

    found = []
    for each in (batch, filled):
        trainee = make_trainee(cfg)
        sums = [torch.cat(trainee.step(each, step, 10)) for step in range(2)]
        found.append((torch.stack(sums), trainee.tensors()))

    (sums, expected), (filled_sums, tensors) = found
    torch.testing.assert_close(filled_sums, sums, rtol=1e-5, atol=1e-6)
    for key, tensor in expected.items():
        assert isinstance(tensor, Tensor)
        near = 1e-4 * float(tensor.abs().max())
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=near, msg=key)


def test_a_batch_of_a_size_is_not_filled():
    """As users with as many events as are read are, whose number is a power of two as a rule."""
    cfg = small_config({**TRUNCATED, "truncate_to": 8})
    filler = BatchFiller.of_run(cfg)
    batch = random_batch(cfg, 64, 64, 3, seed=0)
    for targets, given in ((3, batch), (0, without_candidates(batch))):
        filled = filler.fill(given)
        assert filled.filling is not None
        kept = 8 + targets + 2 * filler.num_context  # the filling sequence has its context alone
        assert (filled.num_tokens, filled.filling.kept_tokens) == (64 + targets, kept)

    trainee = make_trainee(cfg)
    trainee.model.eval()
    torch.testing.assert_close(trainee.model(filler.fill(batch)), trainee.model(batch))


def without_candidates(batch: SequenceBatch) -> SequenceBatch:
    """One user's history alone."""
    end = int(batch.seq_offsets[-1] - batch.num_targets[0])
    names = ("item_codes", "request_codes", "action_mask", "known_mask", "position", "gap_ms")
    columns = {name: getattr(batch, name)[:end] for name in names}
    return replace(
        batch,
        **columns,
        seq_offsets=torch.tensor([0, end]),
        num_targets=torch.zeros_like(batch.num_targets),
        labels=None,
        label_weight=None,
    )


def test_few_candidates_of_long_histories_are_not_filled_up_to_many():
    """They pass the layers behind truncation, which have little else."""
    filler = BatchFiller(num_context=1, keep_events=1024, sizes=64)
    targets = torch.full((4,), 16)
    filling, _ = filler.next_sizes(16_384 + targets, targets)
    assert filling.num_targets == 64 and filling.num_sequences == 8
    own = 4 * (1024 + 16) + filling.num_sequences
    assert own <= filling.kept_tokens < 1.05 * own


def seen_by_layers(trainee: Trainee, batch: SequenceBatch) -> list[tuple]:
    """What a graph would hold of each layer's input."""
    seen: list[tuple] = []

    def note(_: STU, inputs: tuple[Tokens]) -> None:
        (tokens,) = inputs
        seen.append((tokens.x_TE.shape, tokens.seq_offsets.shape, tokens.max_seq_len))

    layers = [layer for layer in trainee.model.modules() if isinstance(layer, STU)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]  # pyright: ignore[reportArgumentType]
    trainee.model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_batches_of_one_size_are_alike_in_every_layer():
    cfg = small_config(TRUNCATED, graph_sizes=16)
    filler, trainee = BatchFiller.of_run(cfg), make_trainee(cfg)
    one = filler.fill(ragged_batch(cfg, (50, 7, 33, 12, 1)))
    other = filler.fill(ragged_batch(cfg, (51, 7, 33, 12, 1), seed=9))
    assert one.filling is not None and other.filling is not None
    assert one.filling.sizes == other.filling.sizes
    assert one.own_tokens != other.own_tokens

    seen = seen_by_layers(trainee, one)
    assert seen == seen_by_layers(trainee, other)
    *_, (shape, _, longest) = seen
    assert (shape[0], longest) == (one.filling.kept_tokens, one.filling.kept_seq_len)


def test_speed_counts_a_batchs_own_tokens_and_a_loaders_process_tells_the_sizes():
    cfg = small_config(TRUNCATED)
    batch = ragged_batch(cfg)
    ((filled, work),) = fill_batches(iter([(batch, Flops())]), BatchFiller.of_run(cfg))
    meter = Meter(world_size=1)
    meter.count_step(filled, work)
    assert meter.tokens == batch.num_tokens
    state = TrainState(steps_per_epoch=1, loss_sum=[], weight_sum=[])
    share = meter.take_speed(state)["train/filled_share"]
    assert share == (filled.num_tokens - batch.num_tokens) / filled.num_tokens
    meter.count_step(batch, work)
    assert "train/filled_share" not in meter.take_speed(state)

    header, _ = next(messages(lambda epoch, step: iter([(filled, work)]), 0, 0))
    assert header.filling == filled.filling


def test_replayed_steps_train_as_others(monkeypatch: pytest.MonkeyPatch):
    """Dropout and item ids left out as well: what was drawn for a recording does not show."""
    monkeypatch.setattr(BatchGraphs, "_capture", capture_none)
    cfg = small_config(TRUNCATED, dropout=0.2, graph_sizes=16)
    cfg = replace(cfg, features=replace(cfg.features, item_id_dropout=0.3))
    filler = BatchFiller.of_run(cfg)
    lengths = (50, 7, 33, 12, 1), (51, 7, 33, 12, 1), (5, 6)
    filled = [filler.fill(ragged_batch(cfg, n, seed=n[0])).pack() for n in lengths]

    found = []
    for graphed in (False, True):
        trainee = make_trainee(cfg)
        if graphed:
            trainee.graphs = graphs.StepGraphs(trainee._captured, trainee.tables, limit=1)
        sums = [torch.cat(trainee.step(filled[i % 3], i, 20)) for i in range(6)]
        found.append((torch.stack(sums), trainee.tensors()))
        if trainee.graphs is not None:
            # two sizes, of which one is kept: that of the first two batches, from the second on
            of_batches = trainee.graphs.of_batches
            assert (of_batches.captured, of_batches.replayed) == (1, 3)

    (sums, expected), (replayed_sums, tensors) = found
    assert torch.equal(replayed_sums, sums)
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key


def test_a_graph_makes_room_when_it_was_not_used_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BatchGraphs, "_capture", capture_none)
    cfg = small_config(TRUNCATED)
    trainee, filler = make_trainee(cfg), BatchFiller.of_run(cfg)
    step_graphs = graphs.StepGraphs(trainee._captured, trainee.tables, limit=1).of_batches
    one, other = (filler.fill(ragged_batch(cfg, n)).pack() for n in (LENGTHS, (5, 6)))

    assert step_graphs.find(one) is None  # it may never come again
    assert step_graphs.find(one) is not None
    found = [step_graphs.find(other) is not None for _ in range(IDLE_BATCHES + 1)]
    assert found == [False] * IDLE_BATCHES + [True]
    assert step_graphs.find(one) is None
    assert (step_graphs.captured, len(step_graphs.last_used)) == (2, 1)
    assert (step_graphs.batches, step_graphs.replayed) == (IDLE_BATCHES + 4, 2)


def test_a_batch_that_was_not_filled_or_was_changed_has_no_graph():
    cfg = small_config(TRUNCATED)
    trainee = make_trainee(cfg)
    step_graphs = graphs.StepGraphs(trainee._captured, trainee.tables, limit=1)
    batch = ragged_batch(cfg).pack()
    assert step_graphs.find(batch) is None

    filled = BatchFiller.of_run(cfg).fill(batch).pack()
    assert step_graphs.find(replace(filled, item_codes=filled.item_codes.clone())) is None


def uses_graphs(cfg: RunConfig, device: str, world_size: int, **given: bool) -> bool:
    return graphs.uses_graphs(cfg.model, cfg.train, device, world_size, **given)


def test_graphs_are_for_one_worker_on_a_gpu():
    cfg = small_config(TRUNCATED)
    assert uses_graphs(cfg, "cuda", 1)
    assert not uses_graphs(cfg, "cpu", 1)
    assert not uses_graphs(cfg, "cuda", 2)
    assert not uses_graphs(
        small_config({"encoder": "hstu", "attention": {"window": None}}), "cuda", 1
    )
    assert not uses_graphs(small_config(TRUNCATED, cuda_graphs="off"), "cuda", 1)

    assert not uses_graphs(cfg, "cuda", 1, sharded=True)
    assert not uses_graphs(cfg, "cuda", 1, retrieval=True)

    wanted = small_config(TRUNCATED, cuda_graphs="on")
    assert uses_graphs(wanted, "cuda", 2)
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs"):
        uses_graphs(wanted, "cpu", 1)


def graphed_trainee(cfg: RunConfig, rank: int, world_size: int) -> Trainee:
    torch.manual_seed(0)
    trainee = Trainee(cfg, vocabulary(cfg), "cpu", rank, world_size)
    trainee.graphs = graphs.StepGraphs(trainee._captured, trainee.tables, limit=4)
    return trainee


def test_what_a_replay_tells_of_its_rows_is_what_a_forward_pass_looks_up():
    cfg = small_config(TRUNCATED)
    torch.manual_seed(0)
    trainee = Trainee(cfg, vocabulary(cfg), "cpu", 0, 2)
    touched = trainee.touched
    assert touched is not None
    batch = BatchFiller.of_run(cfg).fill(ragged_batch(cfg))
    trainee.model(batch)
    seen = torch.cat(touched.looked_up).unique()

    touched.send = lambda: None
    trainee._tell_rows(batch, touched)
    assert torch.equal(torch.cat(touched.looked_up).unique(), seen)


def train_two_ways(rank: int, folder: str) -> None:
    """One of two ranks, which record and replay at different steps."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    BatchGraphs._capture = capture_none  # pyright: ignore[reportAttributeAccessIssue]
    cfg = small_config(TRUNCATED, dropout=0.2, gradient_part_mb=0.002, graph_sizes=16)
    cfg = replace(cfg, features=replace(cfg.features, item_id_dropout=0.3))
    filler, sizes = BatchFiller.of_run(cfg), [LENGTHS, (5, 6), (51, 7, 33, 12, 1)]
    batches = [filler.fill(ragged_batch(cfg, n, seed=10 * rank)).pack() for n in sizes]

    found = []
    for graphed in (False, True):
        trainee = graphed_trainee(cfg, rank, 2)
        if not graphed:
            trainee.graphs = None
        sums = [torch.cat(trainee.step(batches[(i + rank) % 3], i, 20)) for i in range(6)]
        found.append(trainee.tensors() | {"sums": torch.stack(sums)})
    launched, replayed = found
    wrong = [name for name in launched if not torch.equal(replayed[name], launched[name])]
    Path(folder, f"wrong_{rank}").write_text("\n".join(wrong))
    dist.destroy_process_group()


def test_ranks_that_replay_train_as_ranks_that_do_not(tmp_path: Path):
    run_ranks(train_two_ways, (str(tmp_path),), 2)
    assert [(tmp_path / f"wrong_{rank}").read_text() for rank in range(2)] == ["", ""]

"""Small models of random weights and batches of random tokens, for the model's tests."""

from dataclasses import replace

import numpy as np
import torch

from kernels.semi_local_attention.reference import semi_local_mask
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.config import RunConfig
from pipeline.model.encoders.stu import STU
from pipeline.model.ranker import RankingModel

VOCAB = {"item_id": 30, "item.tag": 5, "user.age": 4, "user.city": 6, "request.tab": 4}
RATES = {"is_click": 0.4, "is_like": 0.02}


def make_config(**model: object) -> RunConfig:
    attention = {"window": 2, "full_rows": 2, "scaling_seq_len": 16}
    small = {
        "d_model": 16,
        "d_qk": 8,
        "d_v": 8,
        "dropout": 0.0,
        "head_hidden": 8,
        "position_buckets": 32,
    }
    return config.from_dict(
        {
            "source": {
                "kind": "synthetic",
                "actions": ["is_click", "is_like", "is_hate"],
                "request_columns": ["tab"],
            },
            "tasks": ["is_click", "is_like"],
            "features": {
                "item_id_dim": 4,
                "item": {"tag": {"dim": 2}},
                "user": {"age": {"dim": 2}, "city": {"dim": 3}},
                "user_tokens": {"who": ["age"], "where": ["city"]},
                "request": {"tab": {"dim": 2}},
            },
            "model": {**small, "attention": attention, **model},
        }
    )


def make_model(cfg: RunConfig, seed: int = 0) -> RankingModel:
    torch.manual_seed(seed)
    model = RankingModel(cfg, VOCAB, RATES)
    with torch.no_grad():
        for parameter in model.parameters():  # weights large enough that a wrong mask shows
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def make_batch(histories: list[int], targets: list[int], seed: int = 0) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    lengths = torch.tensor(histories) + torch.tensor(targets)
    num_tokens, num_sequences = int(lengths.sum()), len(histories)
    is_target = torch.cat(
        [torch.arange(h + t) >= h for h, t in zip(histories, targets, strict=True)]
    )
    return SequenceBatch(
        seq_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_targets=torch.tensor(targets, dtype=torch.int32),
        item_codes=torch.stack([draw(30, num_tokens), draw(5, num_tokens)], dim=1),
        request_codes=draw(4, num_tokens, 1),
        action_mask=draw(8, num_tokens).masked_fill(is_target, 0),
        known_mask=draw(8, num_tokens).masked_fill(is_target, 0),
        position=draw(100, num_tokens).long(),
        gap_ms=draw(10**6, num_tokens).long() - 1,
        user_codes=torch.stack([draw(4, num_sequences), draw(6, num_sequences)], dim=1),
        max_seq_len=int(lengths.max()),
    )


def labelled_batch(seed: int) -> SequenceBatch:
    """Five candidates of two sequences, with labels and weights of two tasks."""
    batch = make_batch([5, 3], [2, 3], seed)
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(5, 2, generator=generator) < 0.3).float()
    return replace(batch, labels=labels, label_weight=torch.rand(5, 2, generator=generator))


def joined(parts: list[SequenceBatch]) -> SequenceBatch:
    """The sequences of all parts in one batch."""
    names = (
        "num_targets",
        "item_codes",
        "request_codes",
        "action_mask",
        "known_mask",
        "position",
        "gap_ms",
    )
    names += ("user_codes", "labels", "label_weight")
    lengths = torch.cat([part.seq_offsets.diff() for part in parts])
    return SequenceBatch(
        seq_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        max_seq_len=parts[0].max_seq_len,
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
    )


def tokens_at(batch: SequenceBatch, index: torch.Tensor, **changes: object) -> SequenceBatch:
    """The batch with only the tokens at `index`, in that order."""
    names = ("item_codes", "request_codes", "action_mask", "known_mask", "position", "gap_ms")
    return replace(batch, **{name: getattr(batch, name)[index] for name in names}, **changes)


def assert_candidates_are_blind(model: RankingModel) -> None:
    """A candidate alone in its sequence scores as among others."""
    batch = make_batch([7, 3], [3, 2])
    alone = tokens_at(
        batch,
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 14]),
        seq_offsets=torch.tensor([0, 8, 12]),
        num_targets=torch.tensor([1, 1], dtype=torch.int32),
        max_seq_len=8,
    )
    torch.testing.assert_close(model(alone), model(batch)[[1, 4]])


def dense_layer(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Eq. 1-5 and their two variants as they stand, one sequence with 2 context tokens and 2
    candidates.
    """
    assert isinstance(layer, STU)
    silu, cfg = torch.nn.functional.silu, layer.cfg
    u, q, k, v = layer.uvqk(layer.norm_in(x)).split(layer.shape.uvqk_widths, dim=1)
    u, q, k, v = (silu(u), silu(q), silu(k), silu(v)) if cfg.silu_qkv else (silu(u), q, k, v)
    mask = semi_local_mask(len(x), 2, cfg.attention.window, cfg.attention.full_rows, prefix=2)
    heads = []
    for h in range(2):
        qh, kh, vh = (t[:, 8 * h : 8 * h + 8] for t in (q, k, v))
        heads.append((silu(qh @ kh.T / 8) * mask / 16) @ vh)
    a = torch.cat(heads, dim=1)
    gated = layer.norm_attn(a) * u
    return x + layer.out(torch.cat([u, a, gated], dim=1) if cfg.concat_ua else gated)


def make_maps():
    from pipeline.batches.features import FeatureMaps

    return FeatureMaps(
        item_ids=np.arange(29),
        item_codes=np.zeros((30, 2), np.int32),
        item_count=np.ones(30, np.int64),
        user_ids=np.zeros(0, np.int64),
        user_codes=np.zeros((1, 2), np.int32),
        request_values={"tab": np.arange(3)},
        vocab_sizes=VOCAB,
        base_rates=RATES,
    )

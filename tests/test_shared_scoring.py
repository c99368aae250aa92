"""Requests of a user scored over one encoded history get the scores that each gets alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches.events import ranges
from pipeline.batches.example_batches import history_batch
from pipeline.batches.examples import UserEvents, request_examples, request_passes, user_events
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import evaluation_batch, token_batches
from pipeline.config import ModelConfig, RunConfig, from_dict, to_dict
from pipeline.model.inference.shared_scoring import (
    encode_shared,
    shared_form,
    shares_history_rows,
)
from pipeline.model.ranker import RankingModel
from tests.worlds.tiny import publish_sequences, tiny_config

MASK = {"window": 3, "full_rows": 2, "scaling_seq_len": 16}
CAUSAL = {"window": None, "scaling_seq_len": 16}
LIKED = {"actions": ["is_like"], "num_layers": 2, "attention": MASK, "truncate_after_layer": 1}

FORMS = {
    "truncated": ("layers", {}),
    "full rows alone": ("layers", {"truncate_after_layer": None, "attention": MASK}),
    "truncated to less than the full rows": ("layers", {"truncate_to": 1}),
    "causal and truncated": ("layers", {"attention": CAUSAL, "truncate_to": 3}),
    "old events that all see": ("layers", {"attention": {**MASK, "extra_prefix": 2}}),
    "one layer": ("layers", {"num_layers": 1, "truncate_after_layer": None}),
    "a mixture": (
        "layers",
        {
            "channels": {
                "liked": {**LIKED, "truncate_to": 2},
                "all": {"num_layers": 1, "attention": MASK},
                "causal": {"num_layers": 2, "attention": CAUSAL},
            }
        },
    ),
    "three causal layers": (
        "forward",
        {"num_layers": 3, "attention": CAUSAL, "truncate_after_layer": None},
    ),
    "hstu": (
        "forward",
        {
            "encoder": "hstu",
            "attention": CAUSAL,
            "truncate_after_layer": None,
            "relative_bias": True,
        },
    ),
    "sasrec": (
        "forward",
        {"encoder": "sasrec", "attention": CAUSAL, "truncate_after_layer": None},
    ),
    "din": ("forward", {"encoder": "din", "attention": CAUSAL, "truncate_after_layer": None}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, UserEvents, FeatureMaps]:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"))
    sequences = publish_sequences(cfg)
    return cfg, user_events(sequences, cfg.source, cfg.features), fit_features(cfg)


def with_model(cfg: RunConfig, changes: dict) -> RunConfig:
    raw = to_dict(cfg)
    raw["model"] |= changes
    raw["train"]["layout"] = "request"  # in which every model of this file may be trained
    return from_dict(raw)


def random_model(cfg: RunConfig, maps: FeatureMaps) -> RankingModel:
    torch.manual_seed(0)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong row shows
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", FORMS)
def test_scores_are_those_of_each_request_alone(
    world: tuple[RunConfig, UserEvents, FeatureMaps], name: str
) -> None:
    cfg, users, maps = world
    form, changes = FORMS[name]
    cfg = with_model(cfg, changes)
    assert shared_form(cfg.model) == form
    model = random_model(cfg, maps)
    every = 0, 2**62

    alone = {}
    for part in token_batches(request_examples(users, *every), 50):
        batch = evaluation_batch(users, part, maps, cfg).batch
        batch = replace(batch, dense=batch.dense.double())
        rows, _ = ranges(part.target_begin, part.target_end)
        alone |= dict(zip(rows.tolist(), model(batch), strict=True))

    shared = {}
    for part in token_batches(request_passes(users, *every, 4), 50):
        batch = evaluation_batch(users, part, maps, cfg, shared=True).batch
        batch = replace(batch, dense=batch.dense.double())
        rows, _ = ranges(part.target_begin, part.target_end)
        encoded = encode_shared(model, batch, cfg.model)
        scores = model.score_rows(encoded.candidate_rows, batch)
        shared |= dict(zip(rows.tolist(), scores, strict=True))

    assert shared.keys() == alone.keys()
    assert len(alone) > 100
    rows = sorted(alone)
    torch.testing.assert_close(
        torch.stack([shared[row] for row in rows]),
        torch.stack([alone[row] for row in rows]),
        rtol=1e-5,
        atol=1e-5,
    )
    assert np.unique(torch.stack([alone[row] for row in rows]).numpy()).size > 100


LIMITED = {"window": 3, "full_rows": 0, "scaling_seq_len": 16}


@pytest.mark.parametrize("name", [name for name in FORMS if name != "din"])
def test_a_user_at_any_place_is_found_in_the_same_pass(
    world: tuple[RunConfig, UserEvents, FeatureMaps], name: str
) -> None:
    """The row at which each of two histories ends, one within the other, beside candidates."""
    cfg, users, maps = world
    raw = to_dict(with_model(cfg, FORMS[name][1]))
    raw["retrieval"] |= {"enabled": True}
    cfg = from_dict(raw)
    assert shares_history_rows(cfg.model)
    model = random_model(cfg, maps)

    passes = request_passes(users, 0, 2**62, 10**6)
    batch = evaluation_batch(users, passes, maps, cfg, shared=True).batch
    most = passes.num_history
    assert most.max() > 12
    visible = np.stack([np.maximum(most // 2, 1), most], axis=1)
    asked = replace(
        batch,
        dense=batch.dense.double(),
        num_next=torch.full((len(passes),), 2, dtype=torch.int32),
        next_visible=torch.from_numpy(visible.astype(np.int32)).flatten(),
    )
    found = encode_shared(model, asked, cfg.model)
    for place in range(2):
        ends = passes.history_begin + visible[:, place]
        histories = replace(passes, history_end=ends, target_begin=ends, target_end=ends)
        alone = model.encode(history_batch(users, histories, maps, cfg.inputs), last_history=True)
        torch.testing.assert_close(
            found.next_rows[place::2], alone.last_history_row, rtol=1e-5, atol=1e-5
        )
    without = replace(asked, num_next=None, next_visible=None)
    torch.testing.assert_close(
        found.candidate_rows, encode_shared(model, without, cfg.model).candidate_rows
    )


def test_a_row_that_only_a_window_sees_is_no_candidate(tmp_path: Path) -> None:
    limited = {"attention": LIMITED, "truncate_after_layer": 1}
    model: ModelConfig = with_model(tiny_config(tmp_path), limited).model
    assert shared_form(model) == "layers" and not shares_history_rows(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"time_anchor": "query"},
        {"merge": False},
        {"channels": {"newest": {"num_layers": 1, "max_len": 5, "attention": MASK}}},
    ],
)
def test_what_depends_on_where_a_history_ends_is_scored_alone(
    tmp_path: Path, changes: dict
) -> None:
    model: ModelConfig = with_model(tiny_config(tmp_path), {**changes}).model
    assert shared_form(model) == "none"

"""Validation while training scores what evaluation scores, a sample of it that no number of ranks
changes.
"""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.evaluate import evaluator
from pipeline.model.artifact import load_model
from pipeline.model.heads import RankingMetrics
from pipeline.train.validation import Validator
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(
        tmp_path_factory.mktemp("runs"), train={"validate_every": 1}, evaluate={"batch_tokens": 40}
    )
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    return cfg


def test_all_requests_give_the_numbers_of_evaluation(cfg: RunConfig) -> None:
    loaded = load_model(cfg.model_dir)
    found = Validator(cfg, loaded.maps, "cpu")(loaded.model)
    expected = evaluator.evaluate_model(cfg, cfg.model_dir, ["val"])
    for name in RankingMetrics.names:
        for task in cfg.tasks:
            assert found[f"val_sample/{name}/{task}"] == pytest.approx(
                expected[f"val/{name}/{task}"], abs=1e-6
            )
        tasks = [found[f"val_sample/{name}/{task}"] for task in cfg.tasks]
        assert found[f"val_sample/{name}"] == pytest.approx(np.mean(tasks))


def scored(cfg: RunConfig, rank: int, world_size: int) -> tuple[list[tuple[int, int]], int]:
    """(user, time) of this rank's own candidates, and how many batches it takes part in."""
    maps = load_model(cfg.model_dir).maps
    parts = list(Validator(cfg, maps, "cpu", rank, world_size)._shared_parts())
    return [
        row
        for part, ours in parts
        if ours
        for row in zip(part.user_id, part.event_time, strict=True)
    ], len(parts)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_sample_and_take_equally_many_turns(
    cfg: RunConfig, world_size: int
) -> None:
    cfg = replace(cfg, train=replace(cfg.train, validate_requests=7))
    alone, _ = scored(cfg, 0, 1)
    assert len(set(alone)) == 7, "one user's requests of one time are one request"
    assert scored(cfg, 0, 1)[0] == alone, "the same ones each time"
    shares = [scored(cfg, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share, _ in shares for row in share) == sorted(alone)
    assert len({turns for _, turns in shares}) == 1


def test_a_period_without_requests_and_one_trained_on_are_refused(cfg: RunConfig) -> None:
    late = replace(cfg.split, t_val="2030-01-01T00:00:00+00:00", t_test="2030-01-02T00:00:00+00:00")
    loaded = load_model(cfg.model_dir)
    with pytest.raises(UserError, match="val period holds no request"):
        Validator(replace(cfg, split=late), loaded.maps, "cpu")(loaded.model)
    with pytest.raises(ConfigError, match=r"train\.validate_every must be 0 with split\.refit"):
        replace(cfg, split=replace(cfg.split, refit=True))

"""What an ablation switches off, and that a switch without effect is told."""

import argparse
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

import jobs.ablation
from jobs import cli
from pipeline import config
from pipeline.config import ConfigError, DenseFeature, RunConfig, StochasticLengthConfig, UserError
from pipeline.evaluate import ablation
from pipeline.model.work import count_work
from pipeline.sequences import store
from pipeline.tracking import session
from pipeline.train.one_at_a_time import only_training
from tests.worlds.mixture import make_mixture
from tests.worlds.model import make_batch, make_config, make_model
from tests.worlds.tiny import publish_sequences, tiny_config

TRUNCATED = {
    "attention": {"window": 1, "full_rows": 1, "scaling_seq_len": 16},
    "truncate_after_layer": 1,
}


def whole() -> RunConfig:
    cfg = make_config(**TRUNCATED, truncate_to=2)
    return replace(
        cfg,
        train=replace(cfg.train, stochastic_length=StochasticLengthConfig(alpha=1.5, max_len=8)),
    )


def changes(name: str) -> dict[str, object]:
    base, variant = (
        config.flatten(config.to_dict(cfg))
        for cfg in (whole(), ablation.ablated_variants(whole())[name])
    )
    return {key: variant[key] for key in base if variant[key] != base[key]}


def test_every_variant_changes_its_own_setting_alone() -> None:
    assert list(ablation.ablated_variants(whole())) == [
        "whole",
        "no_merge",
        "no_heterogeneous_actions",
        "window_0",
        "full_rows_0",
        "no_truncation",
        "no_stochastic_length",
        "fp8",
        "int4",
    ]
    assert changes("no_heterogeneous_actions") == {"model.heterogeneous_actions": False}
    assert changes("window_0") == {"model.attention.window": 0}
    assert changes("full_rows_0") == {"model.attention.full_rows": 0}
    assert changes("no_truncation") == {"model.truncate_after_layer": None}
    assert changes("fp8") == {"model.fp8": True}
    assert changes("int4") == {"evaluate.int4_tables": True}
    assert changes("no_merge") == {
        "model.merge": False,
        "model.attention.window": 2,
        "model.attention.full_rows": 2,
        "model.truncate_to": 4,
    }


def test_what_candidates_and_histories_carry_is_taken_away_where_it_is() -> None:
    dense = {"rate": DenseFeature(by=("item_id",))}
    lengths = replace(whole().train.stochastic_length, balance="sampling")
    cfg = replace(whole(), features=replace(whole().features, dense=dense, watch_seconds=(3.0,)))
    found = ablation.ablated_variants(
        replace(cfg, train=replace(cfg.train, stochastic_length=lengths))
    )
    assert found["no_dense_features"].features.dense == {}
    assert found["no_dense_features"].features.watch_seconds == (3.0,)
    assert found["no_watch_bits"].num_action_bits == len(cfg.source.actions)
    assert found["no_load_balance"].train.stochastic_length.balance == "none"
    dealt = replace(lengths, balance="dealing")
    alone = ablation.ablated_variants(
        replace(cfg, train=replace(cfg.train, stochastic_length=dealt))
    )
    assert "no_load_balance" not in alone
    by_tokens = replace(
        cfg.train, stochastic_length=dealt, batch_users=None, batch_tokens=4096, num_workers=1
    )
    found = ablation.ablated_variants(replace(cfg, train=by_tokens))
    assert found["no_load_balance"].train.stochastic_length.balance == "none"


def test_the_time_anchor_is_compared_where_both_layouts_are_the_same() -> None:
    by_request = replace(whole(), train=replace(whole().train, layout="request"))
    assert ablation.ablated_variants(by_request)["query_anchor"].model.time_anchor == "query"


def test_channels_lose_their_masks_and_their_mixture() -> None:
    mixed = ablation.ablated_variants(make_mixture("request"))
    assert not mixed["no_mixture"].model.channels
    assert {channel.attention.window for channel in mixed["window_0"].model.channels.values()} == {
        0
    }
    assert "no_merge" not in mixed


def test_a_baseline_has_no_ablation() -> None:
    with pytest.raises(UserError, match=r"model\.encoder is din"):
        ablation.ablated_variants(make_config(encoder="din", attention={"window": None}))


@pytest.mark.parametrize(
    "name", ["no_merge", "no_heterogeneous_actions", "window_0", "full_rows_0", "no_truncation"]
)
def test_every_variant_is_a_model_that_differs(name: str) -> None:
    batch = make_batch([9, 6], [2, 1])
    variant = ablation.ablated_variants(whole())[name]
    assert make_model(variant)(batch).shape == (3, 2)
    base, work = count_work(batch, whole()), count_work(batch, variant)
    if name in ("window_0", "full_rows_0"):
        assert work.masked_pair_share > base.masked_pair_share
    if name == "no_truncation":
        assert work.truncated_tokens == 0 < base.truncated_tokens
    if name == "no_merge":
        assert work.flops > base.flops


def metrics(**changed: float) -> dict[str, float]:
    keys = (
        "masked_pair_share",
        "truncated_token_share",
        "train/gflop_per_example",
        "forward_gflop_per_candidate",
    )
    scores = {
        f"val/{metric}/{task}": 0.7 for metric in ("auc", "ne") for task in ("is_click", "is_like")
    }
    return dict.fromkeys(keys, 0.5) | scores | changed


def test_a_switch_that_changes_nothing_is_told() -> None:
    found = {
        "whole": metrics(),
        # scores move from run to run on a GPU: shares decide
        "window_0": metrics(**{"val/ne/is_click": 0.6}),
        "full_rows_0": metrics(masked_pair_share=0.6),
        "no_heterogeneous_actions": metrics(**{"val/ne/is_like": 0.8}),
        "fp8": metrics(),
    }
    lines = ablation.find_unmoved(found, "val")
    assert [line.split()[0] for line in lines] == ["window_0", "fp8"]
    assert "masked_pair_share 0.5 with and without" in lines[0]


def test_the_table_shows_what_each_is_worth() -> None:
    found = {
        "whole": metrics(),
        "window_0": metrics(**{"val/ne/is_click": 0.8, "masked_pair_share": 0.625}),
    }
    rows = ablation.markdown_table(found, ("is_click", "is_like"), "val").splitlines()
    assert len(rows) == 4
    assert "+0.0500" in rows[3]
    assert "62.5%" in rows[3]
    assert len({row.count("|") for row in rows}) == 1


def test_variants_read_the_sequences_of_another_run_where_theirs_are(tmp_path: Path) -> None:
    built = tiny_config(tmp_path, name="built")
    publish_sequences(built)
    shared = replace(built.sequences, from_run="built")
    cfg = replace(built, name="ablated", sequences=shared)

    chosen = jobs.ablation.choose_variants(cfg, ["full_rows_0"])
    for variant in chosen.values():
        jobs.ablation.link_sequences(variant.folders, cfg.sequence_dir)
        jobs.ablation.link_sequences(variant.folders, cfg.sequence_dir)  # of a second start
        found = store.read_manifest(variant.sequence_dir)
        assert found == store.read_manifest(built.sequence_dir)
    assert len(chosen) == 2
    assert store.read_manifest(built.sequence_dir), "an earlier link leaves what it names"


def test_a_second_ablation_of_a_run_does_not_remove_what_the_first_trains(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, name="ablated")
    publish_sequences(cfg)
    options = argparse.Namespace(only=["full_rows_0"], split="val")
    with (
        only_training(cfg.runs_dir, "ablated ablation"),
        pytest.raises(UserError, match="is being trained by another job"),
    ):
        jobs.ablation.run_job(cli.Job(cfg, options))


@pytest.mark.cluster
def test_the_job_trains_every_variant_and_fails_on_one_without_effect(
    local_ray: None, mlflow_runs: Path
) -> None:
    """A window wider than every history: full rows or not, the mask is the same."""
    model = tiny_config(mlflow_runs).model
    wide = replace(model, attention=replace(model.attention, window=64))
    cfg = replace(
        tiny_config(mlflow_runs, name="ablated", train={"epochs": 1, "batch_users": 8}), model=wide
    )
    publish_sequences(cfg)
    options = argparse.Namespace(only=["full_rows_0"], split="val")
    with pytest.raises(UserError, match="full_rows_0 changes nothing: masked_pair_share"):
        jobs.ablation.run_job(cli.Job(cfg, options))
    table = (cfg.run_dir / "ablation" / "ablation.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "whole",
        "full_rows_0",
    ]
    with session(cfg):
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(cfg.tracking.experiment)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "ablated ablation"]
    children = {
        run.info.run_name
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert children == {"whole", "full_rows_0"}
    assert parent.info.status == "FAILED"
    with pytest.raises(ConfigError, match="--only"):
        jobs.ablation.choose_variants(cfg, ["no_such"])

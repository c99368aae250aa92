"""Each innovation of ULTRA-HSTU taken away in turn: the configurations, and what must move when one
is.

A variant is the whole model's configuration with one thing off; a precision that it does not have
is put on instead. A switch that changes nothing (a mask wider than every history, say) would read as
"worth nothing", so it is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import (
    AttentionConfig,
    ChannelConfig,
    ModelConfig,
    RunConfig,
    StochasticLengthConfig,
    UserError,
)
from pipeline.model.encoders import check_model

WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Switch:
    """One innovation."""

    applies: Callable[[RunConfig], bool]
    changed: Callable[[RunConfig], RunConfig]
    # the metric that cannot stay as it is when the innovation goes; "ne": that of any task
    moves: str


def _model(cfg: RunConfig, **changes: Any) -> RunConfig:
    return replace(cfg, model=replace(cfg.model, **changes))


def _train(cfg: RunConfig, **changes: Any) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, **changes))


def _features(cfg: RunConfig, **changes: Any) -> RunConfig:
    return replace(cfg, features=replace(cfg.features, **changes))


def _attention(cfg: RunConfig, **changes: Any) -> RunConfig:
    """Changed in the one transducer, or in every channel; a causal mask stays one."""

    def changed(mask: AttentionConfig) -> AttentionConfig:
        return mask if mask.window is None else replace(mask, **changes)

    channels = {}
    for name, channel in cfg.model.channels.items():
        channels[name] = replace(channel, attention=changed(channel.attention))
    return _model(cfg, attention=changed(cfg.model.attention), channels=channels)


def _without_truncation(cfg: RunConfig) -> RunConfig:
    channels = {}
    for name, channel in cfg.model.channels.items():
        channels[name] = replace(channel, truncate_after_layer=None)
    return _model(cfg, truncate_after_layer=None, channels=channels)


def _without_merge(cfg: RunConfig) -> RunConfig:
    """Two tokens an event, and twice the tokens in every distance, so that the mask keeps the same
    events.
    """
    mask = cfg.model.attention
    window = None if mask.window is None else 2 * mask.window

    attention = replace(
        mask, window=window, full_rows=2 * mask.full_rows, extra_prefix=2 * mask.extra_prefix
    )
    return _model(
        cfg,
        merge=False,
        candidate_action="none",
        attention=attention,
        truncate_to=2 * cfg.model.truncate_to,
    )


def _int4(cfg: RunConfig, tables: bool) -> RunConfig:
    return replace(cfg, evaluate=replace(cfg.evaluate, int4_tables=tables))


def _transducers(cfg: ModelConfig) -> list[ChannelConfig | ModelConfig]:
    """The settings of each transducer: the channels', or the one's."""
    return [*cfg.channels.values()] or [cfg]


def _has_window(cfg: RunConfig) -> bool:
    return any(part.attention.window for part in _transducers(cfg.model))


def _has_full_rows(cfg: RunConfig) -> bool:
    for part in _transducers(cfg.model):
        if part.attention.window is not None and part.attention.full_rows:
            return True
    return False


def _truncates(cfg: RunConfig) -> bool:
    return any(part.truncate_after_layer is not None for part in _transducers(cfg.model))


def _balances_load(cfg: RunConfig) -> bool:
    """One rank has nobody to share with: dealing would change nothing."""
    balance = cfg.train.stochastic_length.balance
    return balance == "sampling" or (balance == "dealing" and cfg.train.num_workers > 1)


def _without_balance(cfg: RunConfig) -> RunConfig:
    lengths = replace(cfg.train.stochastic_length, balance="none")
    return _train(cfg, stochastic_length=lengths)


SWITCHES: dict[str, Switch] = {
    "no_merge": Switch(
        lambda cfg: cfg.model.merge and not cfg.model.channels,
        _without_merge,
        "forward_gflop_per_candidate",
    ),
    "no_heterogeneous_actions": Switch(
        lambda cfg: cfg.model.heterogeneous_actions,
        lambda cfg: _model(cfg, heterogeneous_actions=False),
        "ne",
    ),
    "window_0": Switch(
        _has_window,
        lambda cfg: _attention(cfg, window=0),
        "masked_pair_share",
    ),
    "full_rows_0": Switch(
        _has_full_rows,
        lambda cfg: _attention(cfg, full_rows=0),
        "masked_pair_share",
    ),
    "no_truncation": Switch(_truncates, _without_truncation, "truncated_token_share"),
    "no_mixture": Switch(
        lambda cfg: bool(cfg.model.channels),
        lambda cfg: _model(cfg, channels={}),
        "forward_gflop_per_candidate",
    ),
    "no_stochastic_length": Switch(
        lambda cfg: cfg.train.stochastic_length.alpha < 2,
        lambda cfg: _train(cfg, stochastic_length=StochasticLengthConfig()),
        "ne",
    ),
    "no_load_balance": Switch(_balances_load, _without_balance, "ne"),
    "no_dense_features": Switch(
        lambda cfg: bool(cfg.features.dense), lambda cfg: _features(cfg, dense={}), "ne"
    ),
    "no_watch_bits": Switch(
        lambda cfg: bool(cfg.features.watch_seconds or cfg.features.watch_shares),
        lambda cfg: _features(cfg, watch_seconds=(), watch_shares=(), duration_ms_column=None),
        "ne",
    ),
    "query_anchor": Switch(
        # In the user layout it would also be another layout, with many times the sequences.
        lambda cfg: cfg.model.time_anchor == "event" and cfg.train.layout == "request",
        lambda cfg: _model(cfg, time_anchor="query"),
        "ne",
    ),
    "no_fp8": Switch(lambda cfg: cfg.model.fp8, lambda cfg: _model(cfg, fp8=False), "ne"),
    "fp8": Switch(lambda cfg: not cfg.model.fp8, lambda cfg: _model(cfg, fp8=True), "ne"),
    "no_int4": Switch(lambda cfg: cfg.evaluate.int4_tables, lambda cfg: _int4(cfg, False), "ne"),
    "int4": Switch(lambda cfg: not cfg.evaluate.int4_tables, lambda cfg: _int4(cfg, True), "ne"),
}


def ablated_variants(cfg: RunConfig) -> dict[str, RunConfig]:
    """The whole model and, for each innovation that it has, the model without.

    Raises:
        UserError: the model is a baseline, or has a setting that its encoder does not know.
    """
    check_model(cfg.model)
    if cfg.model.encoder != "ultra_hstu":
        raise UserError(
            f"model.encoder is {cfg.model.encoder}: an ablation takes parts away from ultra_hstu"
        )
    found = {WHOLE: cfg}
    for name, switch in SWITCHES.items():
        if switch.applies(cfg):
            found[name] = switch.changed(cfg)
    return found


def find_unmoved(metrics: Mapping[str, Mapping[str, float]], split: str) -> list[str]:
    """One line per variant in which what had to move stayed as it is in the whole model."""
    lines = []
    whole = metrics[WHOLE]
    for name, found in metrics.items():
        if name == WHOLE:
            continue
        moves = SWITCHES[name].moves
        keys = [key for key in whole if key == moves or key.startswith(f"{split}/{moves}/")]

        if all(found[key] == whole[key] for key in keys):
            same = ", ".join(f"{key} {whole[key]:.6g}" for key in keys)
            lines.append(f"{name} changes nothing: {same} with and without")
    return lines


def markdown_table(
    metrics: Mapping[str, Mapping[str, float]], tasks: tuple[str, ...], split: str
) -> str:
    """Markdown, a row per variant: AUC and NE of each task, the mean NE beside the whole model's,
    shares and FLOP.
    """
    header = ["", *(f"{task}, AUC / NE" for task in tasks), "mean NE", "Δ"]
    header += ["pairs masked", "tokens truncated", "MFLOP, training", "inference"]
    lines = [header, ["---"] * len(header)]

    whole_ne = _mean_ne(metrics[WHOLE], tasks, split)
    for name, found in metrics.items():
        line = [name]
        for task in tasks:
            auc, ne = found[f"{split}/auc/{task}"], found[f"{split}/ne/{task}"]
            line.append(f"{auc:.4f} / {ne:.4f}")

        mean_ne = _mean_ne(found, tasks, split)
        moved = "" if name == WHOLE else f"{mean_ne - whole_ne:+.4f}"
        line += [f"{mean_ne:.4f}", moved]

        for key in ("masked_pair_share", "truncated_token_share"):
            line.append(f"{found[key]:.1%}")
        for key in ("train/gflop_per_example", "forward_gflop_per_candidate"):
            line.append(f"{1e3 * found[key]:.3f}")
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _mean_ne(found: Mapping[str, float], tasks: tuple[str, ...], split: str) -> float:
    return sum(found[f"{split}/ne/{task}"] for task in tasks) / len(tasks)

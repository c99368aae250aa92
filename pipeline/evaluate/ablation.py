"""Each innovation of ULTRA-HSTU taken away in turn: the configurations, and what must move when one
is.

A variant is the whole model's configuration with one thing off; a precision that it does not have
is put on instead. A switch that changes nothing (a mask wider than every history, say) would read
as "worth nothing", so it is an error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import (
    AttentionConfig,
    ChannelConfig,
    ModelConfig,
    RunConfig,
    StochasticLengthConfig,
    TrainConfig,
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


def _change(cfg: RunConfig, section: str, **changes: Any) -> RunConfig:
    return replace(cfg, **{section: replace(getattr(cfg, section), **changes)})


def _change_masks(cfg: ModelConfig, **changes: Any) -> ModelConfig:
    """Changed in the one transducer, or in every channel; a causal mask stays one."""

    def changed_mask(mask: AttentionConfig) -> AttentionConfig:
        return mask if mask.window is None else replace(mask, **changes)

    channels = {}
    for name, channel in cfg.channels.items():
        channels[name] = replace(channel, attention=changed_mask(channel.attention))
    return replace(cfg, attention=changed_mask(cfg.attention), channels=channels)


def _without_truncation(cfg: ModelConfig) -> ModelConfig:
    channels = {}
    for name, channel in cfg.channels.items():
        channels[name] = replace(channel, truncate_after_layer=None)
    return replace(cfg, truncate_after_layer=None, channels=channels)


def _without_merge(cfg: ModelConfig) -> ModelConfig:
    """Two tokens an event, and twice the tokens in every distance, so that the mask keeps the same
    events.
    """
    mask = cfg.attention
    window = None if mask.window is None else 2 * mask.window

    attention = replace(
        mask, window=window, full_rows=2 * mask.full_rows, extra_prefix=2 * mask.extra_prefix
    )
    return replace(
        cfg,
        merge=False,
        candidate_action="none",
        attention=attention,
        truncate_to=2 * cfg.truncate_to,
    )


def _widest_channel(cfg: ModelConfig) -> ChannelConfig | None:
    """The first channel that reads every kind of row."""
    for channel in cfg.channels.values():
        if not channel.actions:
            return channel
    return None


def _without_mixture(cfg: ModelConfig) -> ModelConfig:
    """That channel's transducer alone."""
    channel = _widest_channel(cfg)
    assert channel is not None
    if channel.max_len is not None:
        return replace(cfg, channels={"all": channel})
    return replace(
        cfg,
        channels={},
        num_layers=channel.num_layers,
        attention=channel.attention,
        truncate_after_layer=channel.truncate_after_layer,
        truncate_to=channel.truncate_to,
    )


def _transducers(cfg: ModelConfig) -> list[ChannelConfig | ModelConfig]:
    """The settings of each transducer: the channels', or the one's."""
    return [*cfg.channels.values()] or [cfg]


def _has_window(cfg: ModelConfig) -> bool:
    return any(part.attention.window for part in _transducers(cfg))


def _has_full_rows(cfg: ModelConfig) -> bool:
    for part in _transducers(cfg):
        if part.attention.window is not None and part.attention.full_rows:
            return True
    return False


def _truncates(cfg: ModelConfig) -> bool:
    return any(part.truncate_after_layer is not None for part in _transducers(cfg))


def _balances_load(cfg: TrainConfig) -> bool:
    """One rank has nobody to share a step with: dealing then only evens out steps by tokens."""
    balance = cfg.stochastic_length.balance
    deals = cfg.num_workers > 1 or cfg.batch_tokens is not None
    return balance == "sampling" or (balance == "dealing" and deals)


def _without_balance(cfg: TrainConfig) -> TrainConfig:
    lengths = replace(cfg.stochastic_length, balance="none")
    return replace(cfg, stochastic_length=lengths)


SWITCHES: dict[str, Switch] = {
    "no_merge": Switch(
        lambda cfg: cfg.model.merge and not cfg.model.channels,
        lambda cfg: replace(cfg, model=_without_merge(cfg.model)),
        "forward_gflop_per_candidate",
    ),
    "no_heterogeneous_actions": Switch(
        lambda cfg: cfg.model.heterogeneous_actions,
        lambda cfg: _change(cfg, "model", heterogeneous_actions=False),
        "ne",
    ),
    "window_0": Switch(
        lambda cfg: _has_window(cfg.model),
        lambda cfg: replace(cfg, model=_change_masks(cfg.model, window=0)),
        "masked_pair_share",
    ),
    "full_rows_0": Switch(
        lambda cfg: _has_full_rows(cfg.model),
        lambda cfg: replace(cfg, model=_change_masks(cfg.model, full_rows=0)),
        "masked_pair_share",
    ),
    "no_truncation": Switch(
        lambda cfg: _truncates(cfg.model),
        lambda cfg: replace(cfg, model=_without_truncation(cfg.model)),
        "truncated_token_share",
    ),
    "no_mixture": Switch(
        lambda cfg: len(cfg.model.channels) > 1 and _widest_channel(cfg.model) is not None,
        lambda cfg: replace(cfg, model=_without_mixture(cfg.model)),
        "forward_gflop_per_candidate",
    ),
    "no_stochastic_length": Switch(
        lambda cfg: cfg.train.stochastic_length.alpha < 2,
        lambda cfg: _change(cfg, "train", stochastic_length=StochasticLengthConfig()),
        "ne",
    ),
    "no_load_balance": Switch(
        lambda cfg: _balances_load(cfg.train),
        lambda cfg: replace(cfg, train=_without_balance(cfg.train)),
        "ne",
    ),
    "no_dense_features": Switch(
        lambda cfg: bool(cfg.features.dense), lambda cfg: _change(cfg, "features", dense={}), "ne"
    ),
    "no_watch_bits": Switch(
        lambda cfg: bool(cfg.features.watch_seconds or cfg.features.watch_shares),
        lambda cfg: _change(
            cfg, "features", watch_seconds=(), watch_shares=(), duration_ms_column=None
        ),
        "ne",
    ),
    "query_anchor": Switch(
        # In the user layout it would also be another layout, with many times the sequences.
        lambda cfg: cfg.model.time_anchor == "event" and cfg.train.layout == "request",
        lambda cfg: _change(cfg, "model", time_anchor="query"),
        "ne",
    ),
    "no_fp8": Switch(lambda cfg: cfg.model.fp8, lambda cfg: _change(cfg, "model", fp8=False), "ne"),
    "fp8": Switch(lambda cfg: not cfg.model.fp8, lambda cfg: _change(cfg, "model", fp8=True), "ne"),
    "no_int4": Switch(
        lambda cfg: cfg.evaluate.int4_tables,
        lambda cfg: _change(cfg, "evaluate", int4_tables=False),
        "ne",
    ),
    "int4": Switch(
        lambda cfg: not cfg.evaluate.int4_tables,
        lambda cfg: _change(cfg, "evaluate", int4_tables=True),
        "ne",
    ),
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
        keys = []
        for key, value in whole.items():
            is_meant = key == moves or key.startswith(f"{split}/{moves}/")
            if is_meant and math.isfinite(value):
                keys.append(key)

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
    """Over the tasks that the split defines; which those are depends on its rows alone."""
    defined = []
    for task in tasks:
        value = found[f"{split}/ne/{task}"]
        if math.isfinite(value):
            defined.append(value)
    return sum(defined) / len(defined) if defined else math.nan

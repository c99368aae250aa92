"""Each innovation of ULTRA-HSTU taken away in turn: the configurations, and what must move when one
is.

A variant is the whole model's configuration with one thing off; a precision that it does not have
is put on instead.
A switch that changes nothing (a mask wider than every history, say) would read as "worth nothing",
so it is an error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import AttentionConfig, RunConfig, StochasticLengthConfig, UserError

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

    channels = {
        name: replace(channel, attention=changed(channel.attention))
        for name, channel in cfg.model.channels.items()
    }
    return _model(cfg, attention=changed(cfg.model.attention), channels=channels)


def _without_truncation(cfg: RunConfig) -> RunConfig:
    channels = {
        name: replace(channel, truncate_after_layer=None)
        for name, channel in cfg.model.channels.items()
    }
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


def _attentions(cfg: RunConfig) -> list:
    return [channel.attention for channel in cfg.model.channels.values()] or [cfg.model.attention]


def _truncates(cfg: RunConfig) -> bool:
    return any(
        part.truncate_after_layer is not None
        for part in [*cfg.model.channels.values()] or [cfg.model]
    )


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
        lambda cfg: any(mask.window for mask in _attentions(cfg)),
        lambda cfg: _attention(cfg, window=0),
        "masked_pair_share",
    ),
    "full_rows_0": Switch(
        lambda cfg: any(mask.window is not None and mask.full_rows for mask in _attentions(cfg)),
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
    "no_load_balance": Switch(
        # One rank has nobody to share with: dealing would change nothing.
        lambda cfg: (
            cfg.train.stochastic_length.balance == "sampling"
            or (cfg.train.stochastic_length.balance == "dealing" and cfg.train.num_workers > 1)
        ),
        lambda cfg: _train(
            cfg, stochastic_length=replace(cfg.train.stochastic_length, balance="none")
        ),
        "ne",
    ),
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


def variants(cfg: RunConfig) -> dict[str, RunConfig]:
    """The whole model and, for each innovation that it has, the model without.

    Raises:
        UserError: the model is a baseline.
    """
    if cfg.model.encoder != "ultra_hstu":
        raise UserError(
            f"model.encoder is {cfg.model.encoder}: an ablation takes parts away from ultra_hstu"
        )
    return {WHOLE: cfg} | {
        name: switch.changed(cfg) for name, switch in SWITCHES.items() if switch.applies(cfg)
    }


def unmoved(metrics: Mapping[str, Mapping[str, float]], split: str) -> list[str]:
    """One line per variant in which what had to move stayed as it is in the whole model."""
    lines = []
    for name, found in metrics.items():
        if name == WHOLE:
            continue
        moves = SWITCHES[name].moves
        keys = [
            key for key in metrics[WHOLE] if key == moves or key.startswith(f"{split}/{moves}/")
        ]
        if all(found[key] == metrics[WHOLE][key] for key in keys):
            same = ", ".join(f"{key} {metrics[WHOLE][key]:.6g}" for key in keys)
            lines.append(f"{name} changes nothing: {same} with and without")
    return lines


def table(metrics: Mapping[str, Mapping[str, float]], tasks: tuple[str, ...], split: str) -> str:
    """Markdown, a row per variant: AUC and NE of each task, the mean NE beside the whole model's,
    shares and FLOP.
    """

    def mean_ne(name: str) -> float:
        return sum(metrics[name][f"{split}/ne/{task}"] for task in tasks) / len(tasks)

    header = [
        "",
        *(f"{task}, AUC / NE" for task in tasks),
        "mean NE",
        "Δ",
        "pairs masked",
        "tokens truncated",
    ]
    lines = [[*header, "MFLOP, training", "inference"], ["---"] * (len(header) + 2)]
    for name, found in metrics.items():
        scores = [
            f"{found[f'{split}/auc/{task}']:.4f} / {found[f'{split}/ne/{task}']:.4f}"
            for task in tasks
        ]
        moved = "" if name == WHOLE else f"{mean_ne(name) - mean_ne(WHOLE):+.4f}"
        shares = [f"{found[f'{what}_share']:.1%}" for what in ("masked_pair", "truncated_token")]
        flops = [
            f"{1e3 * found[key]:.3f}"
            for key in ("train/gflop_per_example", "forward_gflop_per_candidate")
        ]
        lines.append([name, *scores, f"{mean_ne(name):.4f}", moved, *shares, *flops])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

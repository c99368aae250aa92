"""Rules between sections: what one section says must be known to, or possible with, another.

Each function takes the sections that it reads and raises a `ConfigError` naming key and value.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.errors import require
from pipeline.config.examples import ExampleConfig
from pipeline.config.features import FeatureConfig, SplitConfig
from pipeline.config.logs import SourceConfig
from pipeline.config.model import ChannelConfig, ModelConfig
from pipeline.config.retrieval import RetrievalConfig
from pipeline.config.sequences import CheckConfig
from pipeline.config.train import TrainConfig
from pipeline.schema import MAX_ACTIONS

LONGEST_NAME = 200  # bytes; folders have 255, and those of trials a few more than their search
LONGEST_TASK = 200  # characters; MLflow's names have 250, `val_sample/gauc/` among them


def refuse_unknown_actions(key: str, names: Iterable[str], source: SourceConfig) -> None:
    for name in names:
        rule = f"one of source.actions {list(source.actions)}"
        require(name in source.actions, key, name, rule)


def refuse_unknown_tasks(key: str, names: Iterable[str], tasks: tuple[str, ...]) -> None:
    for name in names:
        require(name in tasks, key, name, f"one of tasks {list(tasks)}")


def refuse_cut_histories_that_others_count(
    examples: ExampleConfig, features: FeatureConfig, retrieval: RetrievalConfig
) -> None:
    """Rates of the user's own rows count all of them, and an index encodes all of them."""
    counting = [name for name, dense in features.dense.items() if "user" in dense.by]
    possible = not counting and not retrieval.enabled
    rule = f"null with retrieval.enabled, or with rates of the user's rows {counting}"
    allowed = examples.max_history is None or possible
    require(allowed, "examples.max_history", examples.max_history, rule)


def refuse_checks_of_unknown_columns(checks: CheckConfig, source: SourceConfig) -> None:
    columns = [column.name for column in source.events.log_columns]
    for name in checks.max_null_share:
        rule = f"one of the LOG columns {columns}"
        require(name in columns, "checks.max_null_share", name, rule)

    refuse_unknown_actions("checks.max_unknown_share", checks.max_unknown_share, source)
    refuse_unknown_actions("checks.action_rate", checks.action_rate, source)


def refuse_features_of_unknown_columns(features: FeatureConfig, source: SourceConfig) -> None:
    known = (*source.request_columns, "hour")
    for name in features.request:
        rule = f"one of source.request_columns or hour {list(known)}"
        require(name in known, "features.request", name, rule)

    outcomes = [column.name for column in source.events.outcomes]
    for name in features.history:
        rule = f"watch_ms or one of source.outcome_columns: {outcomes}"
        require(name in outcomes, "features.history", name, rule)

    items, users = list(features.item), list(features.user)
    rule = "empty without a table of items (source.items)"
    require(not items or source.items_known, "features.item", items, rule)

    rule = "empty without a table of users (source.users)"
    require(not users or source.users_known, "features.user", users, rule)

    duration = features.duration_ms_column
    rule = "null without a table of items (source.items)"
    known_duration = duration is None or source.items_known
    require(known_duration, "features.duration_ms_column", duration, rule)


def refuse_more_bits_than_the_mask_has(num_action_bits: int) -> None:
    require(
        num_action_bits <= MAX_ACTIONS,
        "features.watch_seconds + features.watch_shares",
        num_action_bits,
        f"{MAX_ACTIONS} bits with the actions",
    )


# of `model`: what each of `model.channels` has of its own
OF_EACH_CHANNEL = ("num_layers", "attention", "truncate_after_layer", "truncate_to")


def refuse_settings_beside_channels(given: Mapping[str, Any], channels: Mapping[str, Any]) -> None:
    """A setting of the one transducer says nothing to the transducers of a mixture.

    `given` is what was set beside the channels, as nested mappings.
    """
    model = given.get("model")
    if not channels or not isinstance(model, Mapping):
        return

    names = ", ".join(channels)
    for key in OF_EACH_CHANNEL:
        if key not in model:
            continue

        value = model[key]
        if isinstance(value, Mapping) and value:  # the section's first setting
            name, value = next(iter(value.items()))
            key = f"{key}.{name}"
        rule = (
            "left out beside model.channels, whose transducers do not read it: set "
            f"model.channels.NAME.{key} of {names}"
        )
        require(False, f"model.{key}", value, rule)


def refuse_query_anchor_in_shared_passes(model: ModelConfig, train: TrainConfig) -> None:
    """In the user layout a history row is shared by requests at different times."""
    require(
        model.time_anchor != "query" or train.layout == "request",
        "train.layout",
        train.layout,
        "request where model.time_anchor is query: a row of a shared pass has one place, "
        "not one per request",
    )


def refuse_label_leak_of_filtered_channels(
    channels: dict[str, ChannelConfig], train: TrainConfig
) -> None:
    """A channel that filters rows by their actions must not let their number reach earlier rows.

    In the user layout a candidate's own row, and later ones, lie further on in the same pass. How
    many of them pass the filter is known from their labels alone, so nothing before them may
    depend on that number.
    """
    for name, channel in channels.items():
        key = f"model.channels.{name}"
        leaks = bool(channel.actions) and channel.depends_on_later_rows
        require(
            not leaks or train.layout == "request",
            "train.layout",
            train.layout,
            f"request where {key} filters by actions and has full_rows under a window, max_len "
            "or truncation",
        )


def refuse_validation_on_trained_rows(split: SplitConfig, train: TrainConfig) -> None:
    require(
        not (split.refit and train.validate_every),
        "train.validate_every",
        train.validate_every,
        "0 with split.refit, which trains on the validation period",
    )


def refuse_impossible_retrieval(
    retrieval: RetrievalConfig, model: ModelConfig, train: TrainConfig
) -> None:
    """The tables that items are looked up in must be whole."""
    aligned = max(retrieval.align_trajectories, retrieval.align_steps)
    rule = "lares where retrieval.align_trajectories or align_steps is above 0"
    require(aligned == 0 or model.encoder == "lares", "model.encoder", model.encoder, rule)

    if retrieval.reinforce != "none":
        where = f"where retrieval.reinforce is {retrieval.reinforce}"
        require(model.encoder == "lares", "model.encoder", model.encoder, f"lares {where}")
        rule = f"champion {where}: it goes on from a trained model"
        require(train.init == "champion", "train.init", train.init, rule)
        rule = f"above 0 {where}: passes over a history must differ"
        require(model.loop.noise > 0, "model.loop.noise", model.loop.noise, rule)

    rule = "replicated where retrieval.enabled: the head reads the rows of every item"
    for name, place in train.tables.items():
        require(place != "sharded", f"train.tables.{name}", place, rule)
    require(
        not train.bf16_tables,
        "train.bf16_tables",
        train.bf16_tables,
        "empty where retrieval.enabled",
    )


def refuse_settings_of_missing_tasks(features: FeatureConfig, train: TrainConfig) -> None:
    """Without tasks there are no candidates to carry rates, and no task to validate."""
    rule = "empty with tasks: []: candidates carry them"
    require(not features.dense, "features.dense", list(features.dense), rule)

    rule = "0 with tasks: []: it scores the tasks"
    require(train.validate_every == 0, "train.validate_every", train.validate_every, rule)


def refuse_unknown_tables(train: TrainConfig, features: FeatureConfig) -> None:
    """Only tables that grow with the data can be placed."""
    tables = features.tables
    for name in sorted(train.tables.keys() - {"default"}):
        rule = f"default or one of the tables {list(tables)}"
        require(name in tables, "train.tables", name, rule)

    for key in ("bf16_tables", "host_state_tables"):
        for name in getattr(train, key):
            rule = f"one of the tables {list(tables)}"
            require(name in tables, f"train.{key}", name, rule)


def refuse_names_that_tracking_refuses(tasks: tuple[str, ...]) -> None:
    """MLflow has a metric and a tag of each task, `val/ne/<task>`, and reads their names as paths.

    Letters of any language are letters there.
    """
    for task in tasks:
        in_order = re.fullmatch(r"[\w.: -]+", task) is not None and task.strip() == task
        usable = in_order and task not in (".", "..")
        rule = (
            "a name of letters, digits, _ - . : and spaces within, as MLflow has metrics of it; "
            "source.columns gives a column another name"
        )
        require(usable and len(task) <= LONGEST_TASK, "tasks", task, rule)


def refuse_name_that_is_no_folder(key: str, name: str) -> None:
    """The files of a run lie beside those of MLflow, and the server's copies of its versions."""
    taken = name in (".", "..", "mlflow", "champions")
    usable = "/" not in name and name.strip() != "" and name.isprintable() and not taken
    require(usable, key, name, "a folder name")
    size = len(name.encode())
    require(size <= LONGEST_NAME, key, name, f"of {LONGEST_NAME} bytes at most")

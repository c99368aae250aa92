"""A preset from guesses: YAML that builds, trains and serves, with a comment on each guess."""

import math
import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from pipeline.config import FileFormat
from pipeline.logs.looking.guess import Guess, plain_name
from pipeline.logs.looking.sample import Sample
from pipeline.logs.looking.side import SideGuess
from pipeline.logs.times import show_time

HOUR_MS = 3_600_000
FAR_PAST = datetime(2000, 1, 1, tzinfo=UTC).timestamp() * 1000  # of sequences.earliest_time
MOST_INLINE = 80  # characters
ZONE_NOTE = " # no offset stands in the values: is this the zone they were written in?"
TASKS_NOTE = (
    "# the actions to predict, first what lists are ordered by; of those that exclude one another "
    "keep\n# what you rank by"
)
# what a user does with an item that they do not want
UNWANTED = re.compile(
    r"(skip|dislik|unlik|unfollow|unsubscri|hide|hidden|block|mute|report|spam|negative|bounce"
    r"|remove|refund|returned|cancel|hate|not_interested)"
)
# what is no more than an exposure
SHOWN = re.compile(r"^(seen|shown|show|impression|exposed|exposure|displayed|none|nothing)$")
RETRIEVAL_NOTE = (
    "# retrieval: {enabled: true} # lists from the whole catalogue; without it what is popular, "
    "ranked"
)
MOST_RATES = 3  # of a user with a category
STEPS_WANTED = 60  # of an epoch, where the users are few


def write_preset(
    name: str, logs: Sample, guess: Guess, users: SideGuess | None, items: SideGuess | None
) -> str:
    """The YAML."""
    sections = [
        f"# Guessed from {logs.rows.num_rows:,} rows of {logs.path}: read it, change what is wrong."
        "\n# Every setting: docs/reference/configuration.md",
        _dump({"name": name}),
        _source(logs, guess, users, items),
        _sequences(guess),
        _split(guess),
        TASKS_NOTE,
        _dump({"tasks": _tasks(guess)}),
        _features(guess, users, items),
        _model_and_training(logs, guess),
        RETRIEVAL_NOTE,
    ]
    return "\n".join(section for section in sections if section) + "\n"


def _dump(section: dict[str, Any], by: int = 0) -> str:
    """YAML with a key a line; what is short stands on its key's line."""
    lines = []
    for key, value in section.items():
        text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=1000)
        text = text.removesuffix("\n").removesuffix("\n...")
        if isinstance(value, dict) and len(text) > MOST_INLINE:
            lines.append(" " * by + f"{key}:")
            lines.append(_dump(value, by + 2))
        else:
            lines.append(" " * by + f"{key}: {text}")
    return "\n".join(lines)


def _tasks(guess: Guess) -> list[str]:
    """The actions: at the end those that a list by falling score must not begin with.

    What was only shown is none that is worth predicting.

    [seen, skipped, liked] is [liked, skipped]
    """
    done = [name for name in guess.actions if not SHOWN.match(name.lower())]
    tasks = done or list(guess.actions)
    return sorted(tasks, key=lambda name: bool(UNWANTED.search(name.lower())))


def _form(form: FileFormat) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if form.kind is not None:
        given["kind"] = form.kind
    if form.separator is not None:
        given["separator"] = form.separator
    if form.names:
        given["names"] = list(form.names)
    if form.decimal != ".":
        given["decimal"] = form.decimal
    if form.flatten:
        given["flatten"] = True
    if form.encoding != "utf8":
        given["encoding"] = form.encoding
    if form.impressions is not None:
        given["impressions"] = {"columns": list(form.impressions.columns)}
        if form.impressions.names:
            given["impressions"]["names"] = list(form.impressions.names)
    return given


def _source(logs: Sample, guess: Guess, users: SideGuess | None, items: SideGuess | None) -> str:
    lines = ["source:", _dump({"path": logs.path}, 2)]
    if form := _form(logs.format):
        lines.append(_dump({"format": form}, 2))
    if guess.columns:
        lines.append("  columns: # our name: yours, or how it is read")
        for name, given in guess.columns.items():
            note = ZONE_NOTE if isinstance(given, dict) and "zone" in given else ""
            lines.append(_dump({name: given}, 4) + note)
    lines.append("  actions: # what a user did; the value or the bound that means yes")
    for name, given in guess.actions.items():
        lines.append(f"    {name}:" if given is None else _dump({name: given}, 4))
    if guess.request:
        lines.append(_dump({"request_columns": guess.request}, 2))
    if guess.outcomes:
        lines.append(_dump({"outcome_columns": guess.outcomes}, 2))
    for key, side in (("users", users), ("items", items)):
        if side is not None:
            table: dict[str, Any] = {"path": side.sample.path, "id_column": side.id_column}
            if form := _form(side.sample.format):
                table["format"] = form
            if side.repeated:
                table["repeats"] = "last"
            lines.append(_dump({key: table}, 2))
    return "\n".join(lines)


def _times(guess: Guess) -> np.ndarray:
    """int64 ms, sorted; of a sample without any, one day."""
    known = np.zeros(0, np.int64)
    if guess.times is not None:
        known = np.sort(guess.times.drop_null().to_numpy())
    return known if len(known) else np.array([0, 24 * HOUR_MS])


def _sequences(guess: Guess) -> str:
    """Times before 2000, or in the future, must be allowed."""
    times, given = _times(guess), {}
    if times[0] < FAR_PAST and guess.times is not None:
        given["earliest_time"] = show_time(int(times[0]) - 365 * 24 * HOUR_MS)
    if times[-1] > datetime.now(UTC).timestamp() * 1000:
        given["latest_time"] = show_time(int(times[-1]) + 365 * 24 * HOUR_MS)
    return _dump({"sequences": given}) if given else ""


def _split(guess: Guess) -> str:
    """The newest tenth is for testing, the one before for validation."""
    times = _times(guess)
    step = HOUR_MS if times[-1] - times[0] > 20 * HOUR_MS else 1000
    val, test = (int(np.quantile(times, share)) // step * step for share in (0.8, 0.9))
    test = max(test, val + step)
    note = "# by the sample; the report of a build shows rows per day"
    return f"{note}\n" + _dump({"split": {"t_val": show_time(val), "t_test": show_time(test)}})


def _features(guess: Guess, users: SideGuess | None, items: SideGuess | None) -> str:
    features: dict[str, Any] = {"item_id_dim": 16}
    if items is not None and items.features:
        features["item"] = items.features
    if users is not None and users.features:
        features["user"] = users.features
        features["user_tokens"] = {"profile": list(users.features)}
    features["request"] = {name: {"dim": 8} for name in guess.request} | {"hour": {"dim": 4}}
    features["dense"] = {"item": {"by": ["item_id"]}, "user": {"by": ["user"], "prior": 5}}
    for column in _categories(guess, items):
        features["dense"][f"user_{plain_name(column)}"] = {"by": ["user", column], "prior": 5}
    return _dump({"features": features})


def _categories(guess: Guess, items: SideGuess | None) -> list[str]:
    """The items' first categories. What a user does with each says more at once than a short
    training learns from the history.
    """
    found = []
    for name, kind in (items.features if items is not None else {}).items():
        is_named = name not in guess.request and name not in ("user", "hour")
        if "kind" not in kind and is_named:
            found.append(name)
    return found[:MOST_RATES]


def _model_and_training(logs: Sample, guess: Guess) -> str:
    """A small model, and batches that give an epoch some steps."""
    name = guess.column_of("user_id")
    users = len(logs.rows[name].unique()) if name in logs.rows.column_names else 1
    batch = int(np.clip(users // STEPS_WANTED, 2, 64))
    steps = 2 * math.ceil(users / batch)
    model = {
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 2,
        "d_qk": 32,
        "d_v": 32,
        "attention": {"window": 64, "full_rows": 64, "scaling_seq_len": 64},
    }
    train = {"epochs": 2, "batch_users": batch, "num_workers": 1}
    train["warmup_steps"] = min(100, steps // 20)  # a tenth of the run is the most there may be
    sections = {"model": model, "train": train, "serve": {"port": 0}}
    if guess.implicit:
        sections = {"examples": {"negatives": 4}, **sections}
    return _dump(sections)

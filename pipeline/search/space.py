"""What a search draws from: a YAML beside the preset, held against it before anything starts.

    trials: 12
    space:
      train.lr: {loguniform: [0.0005, 0.02]}
      train.embedding_lr: {loguniform: [0.0005, 0.02]}
      model.num_layers: {integers: [2, 4]}
      model.dropout: {uniform: [0, 0.3]}
      features.item_id_dim: {choices: [16, 32, 64]}

The trials are known before the first one starts: the same files and seed always give the same, and
a search with more trials begins with those of one with fewer.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config
from pipeline.config import ConfigError, RunConfig, rules
from pipeline.config.errors import require
from pipeline.config.reading import apply_overrides, build_section, read_mapping

KINDS = ("choices", "uniform", "loguniform", "integers")
SECTIONS = ("model", "features", "retrieval", "train")  # other settings change the rows or machines
# decide what trials are judged by, or belong to the machines
NOT_SEARCHED = (
    "train.init",
    "train.targets_since",
    "train.num_workers",
    "train.readers",
    "train.use_gpu",
    "train.validate_every",
    "train.validate_requests",
    "train.best_metric",
    "train.publish",
)
TRIES_PER_TRIAL = 50  # draws before a space counts as empty
DIGITS = 4  # of a drawn number: it stands in names and presets


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """The file of `--space`, its `space` aside."""

    trials: int = 8  # the first has the preset's own values
    seed: int = 0  # of the draws
    first_share: float = 0.25  # of the training, before which no trial is ended
    keep_one_in: int = 3  # trials that go on at each rung of ASHA

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials", self.trials, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(0 < self.first_share <= 1, "first_share", self.first_share, "in (0, 1]")
        require(self.keep_one_in >= 2, "keep_one_in", self.keep_one_in, "2 or more")


@dataclass(frozen=True, slots=True)
class Draw:
    """How the values of one setting are drawn."""

    kind: str
    values: tuple[Any, ...]  # the choices, or the two ends of a range, both of them inside

    def sample(self, rng: np.random.Generator) -> Any:
        if self.kind == "choices":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "integers":
            return int(rng.integers(low, high + 1))

        number = rng.uniform(low, high)
        if self.kind == "loguniform":
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        rounded = float(f"{number:.{DIGITS}g}")
        return min(max(rounded, low), high)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """A whole file of `--space`."""

    search: SearchConfig
    draws: dict[str, Draw]  # by setting

    def as_figures(self) -> dict[str, Any]:
        """Fit for JSON, without the number of trials: what must not change while a search goes
        on.
        """
        space = {key: {draw.kind: list(draw.values)} for key, draw in self.draws.items()}
        settings = config.to_dict(self.search)
        return {"space": space} | {k: v for k, v in settings.items() if k != "trials"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of a search: a run under a name of its own."""

    name: str
    settings: dict[str, Any]  # what was drawn, by setting; None where the preset has no value
    cfg: RunConfig


def read_space(path: Path, base: RunConfig) -> SearchSpace:
    """The search space in the YAML at `path`, each setting held against the preset `base`.

    Raises:
        ConfigError: no such file, not of this form, a setting that there is not or that is not
        searched, or an end or choice that it refuses beside the preset's other settings.
    """
    raw = read_mapping("--space", path)
    space = raw.pop("space", None)
    if not isinstance(space, dict) or not space:
        raise ConfigError(
            f"--space {path}: space must be a mapping of settings to draws, got {space!r}"
        )
    try:
        search = build_section(SearchConfig, raw, "")
        draws = {str(key): read_draw(str(key), draw, base) for key, draw in space.items()}
    except ConfigError as error:
        raise ConfigError(f"--space {path}: {error}") from None
    return SearchSpace(search, draws)


def read_draw(key: str, raw: Any, base: RunConfig) -> Draw:
    """One entry of `space`: `{loguniform: [0.001, 0.1]}`.

    Raises:
        ConfigError: names the setting, and what it got.
    """
    if key.split(".")[0] not in SECTIONS:
        raise ConfigError(f"space.{key}: only settings of {', '.join(SECTIONS)} are searched")
    if key in NOT_SEARCHED:
        raise ConfigError(f"space.{key} is the same for all trials: give it with --set")
    if not isinstance(raw, dict) or len(raw) != 1 or next(iter(raw)) not in KINDS:
        raise ConfigError(f"space.{key} must be one of {', '.join(KINDS)}: [...], got {raw!r}")

    ((kind, values),) = raw.items()
    where = f"space.{key}.{kind}"
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where} must be a list that is not empty, got {values!r}")
    if kind != "choices":
        values = _read_ends(where, kind, values)

    taken = []
    for value in values:
        try:
            cfg = with_settings(base, {key: value})
        except ConfigError as error:
            raise ConfigError(f"{where}: {value!r} is refused: {error}") from None
        taken.append(find_setting(config.to_dict(cfg), key))

    absent = _absent_section(config.to_dict(base), key)
    if absent is not None:
        raise ConfigError(
            f"space.{key}: the preset has no {absent}, so that its trial would lack it"
        )
    return Draw(kind, tuple(taken))


def _absent_section(settings: Mapping[str, Any], key: str) -> str | None:
    """The first section of a dotted setting that a mapping lacks, such as a column's; None for
    none. One that is null is there.
    """
    node, path = settings, ""
    for part in key.split(".")[:-1]:
        path = f"{path}.{part}".lstrip(".")
        if part not in node:
            return path
        if not isinstance(node[part], dict):
            return None
        node = node[part]
    return None


def _read_ends(where: str, kind: str, values: list[Any]) -> list[float]:
    """The two ends of a range, low before high."""
    wanted = int if kind == "integers" else float
    ends = []
    for value in values:
        try:  # YAML 1.1 reads 1e-3 as text
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{where} must be two numbers, got {values!r}") from None
        if isinstance(value, bool) or not math.isfinite(number) or wanted(number) != number:
            rule = "whole numbers" if wanted is int else "numbers"
            raise ConfigError(f"{where} must be two {rule}, got {values!r}")
        ends.append(wanted(number))
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise ConfigError(f"{where} must be [low, high] with low below high, got {values!r}")
    if kind == "loguniform" and ends[0] <= 0:
        raise ConfigError(f"{where} must be above 0, got {values!r}")
    return ends


def with_settings(base: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """`base` with the values of some dotted settings.

    Raises:
        ConfigError: an unknown setting, one that the model's channels do not read, or values that
        are refused.
    """
    raw = config.to_dict(base)
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            inner = node.setdefault(parent, {})
            node[parent] = node = {} if inner is None else inner
            if not isinstance(node, dict):
                raise ConfigError(f"unknown setting {key!r}: {parent} is not a section")
        node[last] = value

    cfg = config.from_dict(raw)
    given = apply_overrides({}, [f"{key}={json.dumps(settings[key])}" for key in settings])
    rules.refuse_settings_beside_channels(given, cfg.model.channels)
    return cfg


def find_setting(settings: Mapping[str, Any], key: str) -> Any:
    """The plain value of a dotted setting; None where a section on the way is null."""
    node: Any = settings
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def draw_trials(base: RunConfig, space: SearchSpace) -> list[Trial]:
    """The trials of a search, the first with the values of `base` itself.

    What was drawn before, and combinations that the settings refuse, are drawn anew: a small space
    may have fewer trials than it was asked for.

    Raises:
        ConfigError: no combination beside the preset's own is possible.
    """
    preset = config.to_dict(base)
    own = {key: find_setting(preset, key) for key in space.draws}
    found, seen, refusal = [(own, base)], {json.dumps(own)}, None
    for number in range(TRIES_PER_TRIAL * space.search.trials):
        if len(found) == space.search.trials:
            break
        # each from a seed of its own, so that more trials change none of the first
        rng = np.random.default_rng([space.search.seed, number])
        settings = {key: draw.sample(rng) for key, draw in space.draws.items()}
        if json.dumps(settings) in seen:
            continue
        seen.add(json.dumps(settings))
        try:
            found.append((settings, with_settings(base, settings)))
        except ConfigError as error:
            refusal = error

    if len(found) == 1 < space.search.trials:
        why = f"every combination is refused: {refusal}" if refusal else "it has one combination"
        raise ConfigError(f"space: nothing to search, {why}")

    trials = []
    sequences = search_config(base).sequences
    for number, (settings, cfg) in enumerate(found):
        name = f"{search_name(base.name)}-{number:02}"
        trials.append(Trial(name, settings, replace(cfg, name=name, sequences=sequences)))
    return trials


def search_name(base_name: str) -> str:
    """Name of the search, and of its folder beside those of its trials."""
    return f"{base_name}-tune"


def search_config(base: RunConfig) -> RunConfig:
    """The search itself as a run: its folder lies beside those of its trials."""
    sequences = replace(base.sequences, from_run=base.sequences.from_run or base.name)
    return replace(base, name=search_name(base.name), sequences=sequences)


def short_text(settings: Mapping[str, Any]) -> str:
    """`train.lr=0.01, model.num_layers=2`"""
    return ", ".join(f"{key}={value}" for key, value in settings.items())

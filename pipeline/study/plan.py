"""What a study runs: a YAML beside the preset, held against it before anything starts.

baseline: hstu               # whose slopes the others' are divided by
lengths: [64, 256, 1024]     # examples.max_history
sizes:                       # from small to large; the largest is predicted before it is run
  narrow: {model.d_model: 16}
  wide: {model.d_model: 64}
encoders:
  ultra_hstu: {}
  hstu: {model.encoder: hstu, model.truncate_after_layer: null, model.attention.window: null}
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import config
from pipeline.config import ConfigError, RunConfig
from pipeline.config.errors import require
from pipeline.config.reading import build_section, read_mapping
from pipeline.search.space import Trial, with_settings

SECTIONS = ("model", "features", "train", "evaluate")  # others change rows or machines
# decide on the validation of a point, or on the rows that it is trained on
NOT_VARIED = ("train.init", "train.targets_since", "train.replay_share", "train.publish")
NEVER = 10**9  # steps between two validations: a point is scored once, at its end

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """The file of `--study`, its sizes and encoders aside."""

    baseline: str  # encoder
    lengths: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    split: Literal["val", "test"] = "val"
    task: str | None = None  # whose NE and AUC count; None: the first
    # in place of every size at every length: all sizes at this length, this size at all lengths,
    # and the ladder; both or neither
    at_length: int | None = None
    of_size: str | None = None
    # each encoder's largest point once more, on this share of the training sequences
    data_share: float | None = 0.5
    samples: int = 300  # of the bootstrap, over users and seeds

    def __post_init__(self) -> None:
        in_order = list(self.lengths) == sorted(set(self.lengths)) and min(self.lengths) >= 1
        require(in_order, "lengths", list(self.lengths), "ascending numbers of rows")
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", self.seeds, "each once")
        both = (self.at_length is None) == (self.of_size is None)
        require(both, "of_size", self.of_size, "given with at_length, or both null")
        known = self.at_length is None or self.at_length in self.lengths
        require(known, "at_length", self.at_length, f"one of lengths {list(self.lengths)}, or null")
        share = self.data_share
        require(share is None or 0 < share < 1, "data_share", share, "null, or in (0, 1)")
        require(self.samples >= 20, "samples", self.samples, "20 or more")


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """A whole file of `--study`."""

    study: StudyConfig
    encoders: dict[str, Settings]
    sizes: dict[str, Settings]  # from small to large
    # (size, length) that grow together, a step a length
    ladder: list[tuple[str, int]]
    # encoders of a few points: `study.of_size`, at every length or those of `variant_lengths`
    variants: dict[str, Settings] = field(default_factory=dict)
    variant_lengths: dict[str, list[int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Encoders and variants."""
        return [*self.encoders, *self.variants]

    def places(self, encoder: str) -> list[tuple[str, int]]:
        """Sizes and lengths of an encoder's points, from small to large."""
        study = self.study
        if encoder in self.variants:
            lengths = self.variant_lengths.get(encoder, study.lengths)
            return [(str(study.of_size), length) for length in lengths]

        found = []
        for length, size in itertools.product(study.lengths, self.sizes):
            is_crossed = study.at_length == length or study.of_size == size
            if study.at_length is None or is_crossed or (size, length) in self.ladder:
                found.append((size, length))
        return found

    def as_figures(self) -> dict[str, Any]:
        """Fit for JSON, without the seeds and the bootstrap: what must not change while a study
        goes on.
        """
        whole = config.to_dict(self.study) | {"encoders": self.encoders, "sizes": self.sizes}
        whole |= {"variants": self.variants, "variant_lengths": self.variant_lengths}
        whole["size_by_length"] = [size for size, _ in self.ladder]
        return {key: value for key, value in whole.items() if key not in ("seeds", "samples")}


@dataclass(frozen=True, slots=True)
class Point:
    """One training of a study, a run under the name of its trial."""

    encoder: str
    size: str
    length: int
    seed: int
    share: float  # of the training sequences
    trial: Trial

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What its seeds have in common."""
        return self.encoder, self.size, self.length, self.share


def read_plan(path: Path, tasks: Sequence[str]) -> StudyPlan:
    """The study in the YAML at `path`, of one of these `tasks`.

    Raises:
        ConfigError: no such file, not of this form, or a setting that a study cannot vary.
    """
    raw = read_mapping("--study", path)
    try:
        encoders = _read_settings("encoders", raw.pop("encoders", None))
        sizes = _read_settings("sizes", raw.pop("sizes", None))
        variants, only_at = _read_variants(raw.pop("variants", None))
        steps = raw.pop("ladder", None)
        study = build_section(StudyConfig, raw, "")
        rungs = read_ladder(steps, list(sizes), study.lengths)
        _check_variants(study, encoders, sizes, variants, only_at)
        known = list(encoders)
        require(study.baseline in known, "baseline", study.baseline, f"one of encoders {known}")
        task = study.task
        rule = f"one of tasks {list(tasks)}, or null for the first"
        require(task is None or task in tasks, "task", task, rule)
    except ConfigError as error:
        raise ConfigError(f"--study {path}: {error}") from None
    return StudyPlan(study, encoders, sizes, rungs, variants, only_at)


def _read_variants(raw: Any) -> tuple[dict[str, Settings], dict[str, list[int]]]:
    """Settings of each variant, and the lengths of those that name some.

    {deep: {lengths: [1024], model.num_layers: 3}}    {deep: {model.num_layers: 3}}, {deep: [1024]}
    """
    if raw is None:
        return {}, {}

    settings, lengths = {}, {}
    for name, said in raw.items() if isinstance(raw, dict) else ():
        if isinstance(said, dict) and "lengths" in said:
            lengths[str(name)] = said["lengths"]
            said = {key: value for key, value in said.items() if key != "lengths"}
        settings[name] = said
    return _read_settings("variants", settings or raw), lengths


def _check_variants(
    study: StudyConfig,
    encoders: Settings,
    sizes: Settings,
    variants: Settings,
    only_at: dict[str, list[int]],
) -> None:
    """Raises ConfigError for a size that is none, or variants without a place of their own."""
    size = study.of_size
    require(size is None or size in sizes, "of_size", size, f"one of sizes {list(sizes)}, or null")
    require(not variants or size is not None, "variants", list(variants), "none without of_size")
    twice = sorted(encoders.keys() & variants.keys())
    require(not twice, "variants", twice, "names that no encoder has")
    for name, lengths in only_at.items():
        known = isinstance(lengths, list) and bool(lengths) and set(lengths) <= set(study.lengths)
        rule = f"some of lengths {list(study.lengths)}"
        require(known, f"variants.{name}.lengths", lengths, rule)


def _read_settings(key: str, raw: Any) -> dict[str, Settings]:
    """`encoders`, `sizes` or `variants`: names, and the settings of each."""
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{key} must be a mapping of names to settings, got {raw!r}")

    found: dict[str, Settings] = {}
    for name, settings in raw.items():
        where = f"{key}.{name}"
        if not isinstance(settings, dict):
            raise ConfigError(f"{where} must be a mapping of settings, got {settings!r}")
        rule = "letters, digits, - and _"
        plain = str(name).replace("_", "").replace("-", "").isalnum()
        require(plain, key, name, rule)
        for setting in settings:
            varied = setting.split(".")[0] in SECTIONS and setting not in NOT_VARIED
            rule = f"a setting of {', '.join(SECTIONS)} that a study may vary"
            require(varied, where, setting, rule)
        found[str(name)] = dict(settings)
    return found


def study_name(base_name: str) -> str:
    """Name of the study, and of its folder beside those of its points."""
    return f"{base_name}-study"


def study_config(base: RunConfig) -> RunConfig:
    """The study itself as a run."""
    sequences = replace(base.sequences, from_run=base.sequences.from_run or base.name)
    return replace(base, name=study_name(base.name), sequences=sequences)


def plan_points(base: RunConfig, plan: StudyPlan) -> list[Point]:
    """All points, seed by seed: a study that is cut short has whole seeds.

    Raises:
        ConfigError: settings that are refused together.
    """
    points = []
    study = plan.study
    for seed, encoder in itertools.product(study.seeds, plan.names):
        for size, length in plan.places(encoder):
            points.append(_make_point(base, plan, encoder, size, length, seed, 1.0))

    if study.data_share is not None:
        largest, longest = list(plan.sizes)[-1], study.lengths[-1]
        for seed, encoder in itertools.product(study.seeds, plan.encoders):
            point = _make_point(base, plan, encoder, largest, longest, seed, study.data_share)
            points.append(point)
    return points


def _make_point(
    base: RunConfig,
    plan: StudyPlan,
    encoder: str,
    size: str,
    length: int,
    seed: int,
    share: float,
) -> Point:
    settings = plan.sizes[size] | (plan.encoders | plan.variants)[encoder]
    settings = settings | {"examples.max_history": length, "seed": seed}
    if base.train.validate_every == 0:
        settings.setdefault("train.validate_every", NEVER)
    name = f"{study_name(base.name)}-{encoder}-{size}-{length}-s{seed}"
    if share < 1:
        # of the rows before the end of training, so of all of them, only a share is trained on
        settings |= {"train.targets_since": base.split.t_val, "train.replay_share": share}
        name += f"-of-{share:g}".replace(".", "_")

    try:
        cfg = with_settings(base, settings)
    except ConfigError as error:
        raise ConfigError(f"point {encoder}, {size}, length {length} is refused: {error}") from None
    sequences = study_config(base).sequences
    train = replace(cfg.train, num_workers=1, min_workers=None)
    cfg = replace(cfg, name=name, sequences=sequences, train=train)
    return Point(encoder, size, length, seed, share, Trial(name, settings, cfg))


def read_ladder(raw: Any, sizes: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int]]:
    """The size at each length, as in `ladder: [d16, d32, d64]`; None is `even_ladder`.

    Raises:
        ConfigError: not one known size a length.
    """
    if raw is None:
        return even_ladder(sizes, lengths)
    is_known = isinstance(raw, list) and len(raw) == len(lengths) and set(raw) <= set(sizes)
    require(is_known, "ladder", raw, f"null, or a size of {list(sizes)} for each of the lengths")
    return list(zip(raw, lengths, strict=True))


def even_ladder(sizes: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int]]:
    """Sizes and lengths that grow together, a step a length, as in the paper's figure: from the
    smallest size at the shortest length to the largest at the longest. Of one length, every size.

    sizes a b c d e, lengths 64 256 1024    (a, 64) (c, 256) (e, 1024)
    """
    if len(lengths) == 1:
        return [(size, lengths[0]) for size in sizes]
    steps = []
    for number, length in enumerate(lengths):
        place = round(number * (len(sizes) - 1) / (len(lengths) - 1))
        steps.append((sizes[place], length))
    return steps

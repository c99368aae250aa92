"""The gate before a version is promoted: what its validation must show. No tracking server here.

A version says what it showed in its tags: `val/ne/<task>` for each task, `val/baseline_ne/<task>`
of the item's smoothed rate on the same rows, `manifest`, `split.t_val` and `split.t_test` for which
rows those are, `refit` where it was trained on them, and `validated_by` for the version that then
stands for it.

Two figures are compared only if they are of the same rows, and only those that are defined. Where a
version's own figures are of other rows, it is scored anew:

    validated on      rows at hand   scored anew
    both: Monday      any            none: their own figures are compared
    Monday, Tuesday   Tuesday        the champion, on the challenger's rows
    Monday, Tuesday   Wednesday      both, on the rows at hand
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pipeline.config import TrackingConfig

REFIT = "refit"  # tag of a version trained on the validation rows
NE_PREFIX = "val/ne/"
BASELINE_PREFIX = "val/baseline_ne/"
ROWS = ("manifest", "split.t_val", "split.t_test")  # tags: which rows were validated on
LONGEST_SHOWN = 25  # of a tag: a time with its offset, the start of a digest


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's answer, with the reason in words."""

    promoted: bool
    reason: str
    warning: str = ""  # of a version that is promoted: which tasks it has learned nothing of


@dataclass(frozen=True, slots=True)
class ScoredAnew:
    """NE by task of two versions on the same rows, where their own figures are of others."""

    champion: Mapping[str, float]
    challenger: Mapping[str, float] | None = None  # None: the rows are the challenger's own


class Version(Protocol):
    """A registered version, as far as the gate looks at it."""

    @property
    def version(self) -> str: ...
    @property
    def tags(self) -> Mapping[str, str]: ...


def judge_version(
    settings: TrackingConfig,
    tasks: Sequence[str],
    challenger: Version,
    champion: Version | None,
    *,
    anew: ScoredAnew | None = None,
    force_first: bool = False,
) -> Decision:
    """Let a challenger pass whose validation NE is low enough, alone and beside the champion's.

    `gate_max_ne` holds for each task it names. The mean over the tasks that are defined on both
    sides may be at most `gate_max_regression` above the champion's; a first champion must be below
    the item's smoothed rate.

    Args:
        anew: what to go by where the versions' own figures are of different rows.
        force_first: a first champion need not beat the item's rate.
    """
    challenger_ne = None if anew is None else anew.challenger
    refusal = _refuse_alone(settings, tasks, challenger)
    if refusal is None and challenger_ne is not None:
        refusal = _above_limit(settings, challenger_ne)
    if refusal is not None:
        return Decision(False, f"refused: {refusal}")
    if champion is None:
        return _judge_first(tasks, challenger, force_first)

    # of each version what it was scored at anew, else what its tags say
    new = defined_ne(validation_ne(challenger) if challenger_ne is None else challenger_ne)
    old = defined_ne(validation_ne(champion) if anew is None else anew.champion)

    shared = [task for task in tasks if task in new and task in old]
    if not shared:
        first = _judge_first(tasks, challenger, force_first)
        why = f"champion {champion.version} has no task to compare with"
        return Decision(first.promoted, f"{first.reason}; {why}", first.warning)

    differences = "" if anew is not None else row_differences(challenger, champion)
    if differences:
        return Decision(
            False,
            f"refused: champion {champion.version} was validated on other rows and was not "
            f"scored on these: {differences}",
        )

    # whose figures they are, and of which rows
    if challenger_ne is not None:
        origin = ", both scored anew on the rows at hand"
    elif anew is not None:
        origin = _in_place_of(challenger) + ", scored anew on the challenger's rows"
    else:
        origin = _in_place_of(challenger)

    notes = origin + _left_out(tasks, shared) + _given_up(tasks, old)
    return _judge_change(settings, champion, shared, new, old, notes)


def learned_until(version: Version) -> datetime | None:
    """The time up to which a version has learned, by its tags; None where they do not say it."""
    # a refit has learned the validation rows as well
    tag = "split.t_test" if REFIT in version.tags else "split.t_val"
    said = version.tags.get(tag)
    return None if said is None else datetime.fromisoformat(said)


def row_differences(challenger: Version, champion: Version) -> str:
    """In words, by which tags the rows of two validations differ; "" where they are the same.

    A tag that one of them lacks, having been registered by older code, says nothing.
    """
    lines = []
    for tag in ROWS:
        new, old = challenger.tags.get(tag), champion.tags.get(tag)
        if new is None or old is None or new == old:
            continue

        name = "sequences" if tag == "manifest" else tag
        old, new = old[:LONGEST_SHOWN], new[:LONGEST_SHOWN]
        lines.append(f"{name} {old} of the champion, {new} of the challenger")
    return ", ".join(lines)


def _refuse_alone(
    settings: TrackingConfig, tasks: Sequence[str], challenger: Version
) -> str | None:
    """Why the challenger fails by itself; None where it does not."""
    new, number = validation_ne(challenger), challenger.version
    if REFIT in challenger.tags and not new:
        return (
            f"version {number} was trained on the validation rows (split.refit); "
            "--validated-by names a version of the same settings trained without it"
        )

    missing = [task for task in tasks if task not in new]
    if missing:
        return f"version {number} has no validation NE of {', '.join(missing)}"

    # NE is undefined where the rows have one class alone. The baseline of the same rows has a
    # number, so they have both: then it is the version's scores that are none
    baseline = defined_ne(baseline_ne(challenger))
    broken = [task for task in tasks if not math.isfinite(new[task]) and task in baseline]
    if broken:
        return f"val/ne of {', '.join(broken)} is not a number: version {number} gives no scores"
    if not defined_ne(new):
        return f"no task of version {number} has a defined validation NE"

    return _above_limit(settings, new)


def _above_limit(settings: TrackingConfig, ne: Mapping[str, float]) -> str | None:
    """Which of these figures is above `gate_max_ne`; None where none is."""
    for task, highest in settings.gate_max_ne.items():
        if math.isfinite(ne[task]) and ne[task] > highest:
            return f"val/ne/{task} {ne[task]:.4f} is above the gate's {highest:g}"
    return None


def _judge_first(tasks: Sequence[str], challenger: Version, force_first: bool) -> Decision:
    """The decision where there is no champion: beside the item's smoothed rate.

                    is_click   is_like     mean of what both have
    challenger        0.91      0.80            0.91
    item's rate       0.93      nan             0.93        below it: promoted
    """
    new = defined_ne(validation_ne(challenger))
    baseline = defined_ne(baseline_ne(challenger))

    by_task = ", ".join(f"{task} {new[task]:.4f}" for task in tasks if task in new)
    figures = by_task + _stand_in(challenger) + _left_out(tasks, new)

    shared = [task for task in new if task in baseline]
    is_better = False
    floor = "has no baseline to beat: run jobs.evaluate again"
    if shared:
        own, of_item = _mean_over(shared, new), _mean_over(shared, baseline)
        is_better = own < of_item
        floor = f"mean val/ne {own:.4f}, the item's smoothed rate has {of_item:.4f}"

    warning = _nothing_learned(tasks, new)
    if is_better:
        reason = f"promoted: the first champion, val/ne {figures}; {floor}"
        return Decision(True, reason, warning)
    if force_first:
        reason = f"promoted: the first champion by --force-first, val/ne {figures}; {floor}"
        return Decision(True, reason, warning)
    return Decision(
        False,
        f"refused: a first champion must beat the item's smoothed rate; {floor}; "
        f"val/ne {figures}; --force-first promotes it all the same",
    )


def _judge_change(
    settings: TrackingConfig,
    champion: Version,
    shared: Sequence[str],
    new: Mapping[str, float],
    old: Mapping[str, float],
    notes: str,
) -> Decision:
    """The decision by the mean change over the tasks that both have; `notes` end its sentence.

                    is_click   is_like     mean change    gate_max_regression 0.001
    champion          0.9100    0.8000
    challenger        0.9080    0.8030      +0.0005       promoted
    """
    change = sum(new[task] - old[task] for task in shared) / len(shared)
    found = f"mean val/ne over {', '.join(shared)} {change:+.4f}"
    compared = f"{found} against champion {champion.version}{notes}"

    allowed = settings.gate_max_regression
    if not change <= allowed:  # a change that is no number passes nothing
        return Decision(False, f"refused: {compared}, allowed {allowed:+g}")
    return Decision(True, f"promoted: {compared}", _nothing_learned(shared, new))


def _nothing_learned(tasks: Sequence[str], ne: Mapping[str, float]) -> str:
    """Names the tasks whose NE is not below that of the rows' constant rate, 1; "" for none.

    The item's smoothed rate may be worse still, and so may the champion: neither holds it up.
    """
    worse = [f"{task} {ne[task]:.4f}" for task in tasks if task in ne and ne[task] >= 1]
    if not worse:
        return ""
    return (
        f"val/ne {', '.join(worse)}: not below 1, which the constant rate of the validation rows "
        "has. Its scores say nothing of these actions"
    )


def _mean_over(tasks: Sequence[str], ne: Mapping[str, float]) -> float:
    return sum(ne[task] for task in tasks) / len(tasks)


# Ends of a decision's sentence, each empty where there is nothing to say


def _left_out(tasks: Sequence[str], counted: Mapping[str, float] | Sequence[str]) -> str:
    missing = [task for task in tasks if task not in counted]
    return f" (left out, not defined on both sides: {', '.join(missing)})" if missing else ""


def _given_up(tasks: Sequence[str], old: Mapping[str, float]) -> str:
    """Names what the champion predicts and the challenger does not."""
    gone = [task for task in old if task not in tasks]
    return f" (no longer predicted: {', '.join(gone)})" if gone else ""


def _stand_in(challenger: Version) -> str:
    """Names the version whose figures those of a refit are."""
    if REFIT not in challenger.tags:
        return ""
    return f" of version {challenger.tags['validated_by']}"


def _in_place_of(challenger: Version) -> str:
    """The same, beside a champion's."""
    if REFIT not in challenger.tags:
        return ""
    stand_in = challenger.tags["validated_by"]
    return f", by version {stand_in} in the place of {challenger.version}"


def validation_ne(version: Version) -> dict[str, float]:
    """Normalised entropy on the validation rows, by task, from the version's tags."""
    return _by_task(version, NE_PREFIX)


def baseline_ne(version: Version) -> dict[str, float]:
    """That of the item's smoothed rate on the same rows."""
    return _by_task(version, BASELINE_PREFIX)


def _by_task(version: Version, prefix: str) -> dict[str, float]:
    found = {}
    for key, value in version.tags.items():
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = float(value)
    return found


def defined_ne(by_task: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers."""
    return {task: value for task, value in by_task.items() if math.isfinite(value)}

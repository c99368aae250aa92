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


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's answer, with the reason in words."""

    promoted: bool
    reason: str


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
    champion_ne: Mapping[str, float] | None = None,
    challenger_ne: Mapping[str, float] | None = None,
    force_first: bool = False,
) -> Decision:
    """Let a challenger pass whose validation NE is low enough, alone and beside the champion's.

    `gate_max_ne` holds for each task it names. The mean over the tasks that are defined on both
    sides may be at most `gate_max_regression` above the champion's; a first champion must be below
    the item's smoothed rate.

    Args:
        champion_ne: the champion's NE by task on the challenger's rows, where its own figures are
            of others.
        challenger_ne: the challenger's, where both were scored on rows that are neither's.
        force_first: a first champion need not beat the item's rate.
    """
    refusal = _refusal(settings, tasks, challenger)
    if refusal is None and challenger_ne is not None:
        refusal = _above_limit(settings, challenger_ne)
    if refusal is not None:
        return Decision(False, f"refused: {refusal}")
    if champion is None:
        return _first(tasks, challenger, force_first)

    scored_anew = champion_ne is not None
    new = defined_ne(challenger_ne if challenger_ne is not None else validation_ne(challenger))
    old = defined_ne(champion_ne if champion_ne is not None else validation_ne(champion))
    shared = [task for task in tasks if task in new and task in old]
    if not shared:
        first = _first(tasks, challenger, force_first)
        why = f"champion {champion.version} has no task to compare with"
        return Decision(first.promoted, f"{first.reason}; {why}")

    if not scored_anew:
        differences = row_differences(challenger, champion)
        if differences:
            return Decision(
                False,
                f"refused: champion {champion.version} was validated on other rows and was not "
                f"scored on these: {differences}",
            )

    of_rows = _stand_in_place(challenger) if challenger_ne is None else ""
    if challenger_ne is not None:
        of_rows += ", both scored anew on the rows at hand"
    elif scored_anew:
        of_rows += ", scored anew on the challenger's rows"
    return _compared(settings, tasks, champion, new, old, of_rows)


def learned_until(version: Version) -> datetime | None:
    """The time up to which a version has learned, by its tags; None where they do not say it."""
    tag = "split.t_test" if REFIT in version.tags else "split.t_val"
    said = version.tags.get(tag)
    return None if said is None else datetime.fromisoformat(said)


def row_differences(challenger: Version, champion: Version) -> str:
    """In words, by which tags the rows of two validations differ; "" where they are the same.

    A tag that a version of before does not have says nothing.
    """
    lines = []
    for tag in ROWS:
        new, old = challenger.tags.get(tag), champion.tags.get(tag)
        if new is not None and old is not None and new != old:
            name = "sequences" if tag == "manifest" else tag
            lines.append(f"{name} {old[:25]} of the champion, {new[:25]} of the challenger")
    return ", ".join(lines)


def _refusal(settings: TrackingConfig, tasks: Sequence[str], challenger: Version) -> str | None:
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

    # undefined although these rows have both classes: the scores are no numbers
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


def _first(tasks: Sequence[str], challenger: Version, force_first: bool) -> Decision:
    """The decision where there is no champion: beside the item's smoothed rate."""
    new = defined_ne(validation_ne(challenger))
    said = ", ".join(f"{task} {new[task]:.4f}" for task in tasks if task in new)
    said += _stand_in(challenger) + _left_out(tasks, new)

    baseline = defined_ne(baseline_ne(challenger))
    shared = [task for task in new if task in baseline]
    if not shared:
        floor = "has no baseline to beat: run jobs.evaluate again"
        is_better = False
    else:
        of_item = sum(baseline[task] for task in shared) / len(shared)
        own = sum(new[task] for task in shared) / len(shared)
        is_better = own < of_item
        floor = f"mean val/ne {own:.4f}, the item's smoothed rate has {of_item:.4f}"

    if is_better:
        return Decision(True, f"promoted: the first champion, val/ne {said}; {floor}")
    if force_first:
        return Decision(
            True, f"promoted: the first champion by --force-first, val/ne {said}; {floor}"
        )
    return Decision(
        False,
        f"refused: a first champion must beat the item's smoothed rate; {floor}; val/ne {said}; "
        "--force-first promotes it all the same",
    )


def _compared(
    settings: TrackingConfig,
    tasks: Sequence[str],
    champion: Version,
    new: Mapping[str, float],
    old: Mapping[str, float],
    of_rows: str,
) -> Decision:
    """The decision by the mean over the tasks that both have; `of_rows` says whose figures."""
    shared = [task for task in tasks if task in new and task in old]
    change = sum(new[task] - old[task] for task in shared) / len(shared)

    said = f"mean val/ne over {', '.join(shared)} {change:+.4f} against champion {champion.version}"
    said += of_rows + _left_out(tasks, shared) + _given_up(tasks, old)

    if not change <= settings.gate_max_regression:
        return Decision(False, f"refused: {said}, allowed {settings.gate_max_regression:+g}")
    return Decision(True, f"promoted: {said}")


def _left_out(tasks: Sequence[str], counted: Mapping[str, float] | Sequence[str]) -> str:
    missing = [task for task in tasks if task not in counted]
    return f" (left out, not defined on both sides: {', '.join(missing)})" if missing else ""


def _given_up(tasks: Sequence[str], old: Mapping[str, float]) -> str:
    """Names what the champion predicts and the challenger does not."""
    gone = [task for task in old if task not in tasks]
    return f" (no longer predicted: {', '.join(gone)})" if gone else ""


def _stand_in(challenger: Version) -> str:
    if REFIT not in challenger.tags:
        return ""
    return f" of version {challenger.tags['validated_by']}"


def _stand_in_place(challenger: Version) -> str:
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

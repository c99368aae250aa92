"""The gate before a version is promoted: what its validation must show. No tracking server here.

A version says what it showed in its tags: `val/ne/<task>` for each task, `manifest` for the
sequences, `refit` where it was trained on the validation rows, and `validated_by` for the version
that then stands for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import TrackingConfig

REFIT = "refit"  # tag of a version trained on the validation rows
NE_PREFIX = "val/ne/"


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
) -> Decision:
    """Let a challenger pass whose validation NE is low enough, alone and beside the champion's.

    `gate_max_ne` holds for each task it names, and the mean over the tasks of both may be at most
    `gate_max_regression` above the champion's.
    """
    new = validation_ne(challenger)
    refusal = _refusal(settings, tasks, challenger, new)
    if refusal is not None:
        return Decision(False, f"refused: {refusal}")

    said = ", ".join(f"{task} {new[task]:.4f}" for task in tasks)
    if REFIT in challenger.tags:
        said += f" of version {challenger.tags['validated_by']}"
    if champion is None:
        return Decision(True, f"promoted: the first champion, val/ne {said}")

    old = validation_ne(champion)
    shared = [task for task in tasks if task in old]
    if not shared:
        return Decision(
            True, f"promoted: champion {champion.version} shares no task with it, val/ne {said}"
        )
    return _compared(settings, shared, challenger, champion)


def _refusal(
    settings: TrackingConfig, tasks: Sequence[str], challenger: Version, new: Mapping[str, float]
) -> str | None:
    """Why the challenger fails by itself; None where it does not."""
    if REFIT in challenger.tags and not new:
        return (
            f"version {challenger.version} was trained on the validation rows (split.refit); "
            "--validated-by names a version of the same settings trained without it"
        )
    missing = [task for task in tasks if task not in new]
    if missing:
        return f"version {challenger.version} has no validation NE of {', '.join(missing)}"

    for task, highest in settings.gate_max_ne.items():
        # so that NaN is refused
        if not new[task] <= highest:
            return f"val/ne/{task} {new[task]:.4f} is above the gate's {highest:g}"
    return None


def _compared(
    settings: TrackingConfig, shared: Sequence[str], challenger: Version, champion: Version
) -> Decision:
    """The decision by the challenger's mean over the tasks `shared`, beside the champion's."""
    new, old = validation_ne(challenger), validation_ne(champion)
    change = sum(new[task] - old[task] for task in shared) / len(shared)

    said = f"mean val/ne over {', '.join(shared)} {change:+.4f} against champion {champion.version}"
    if REFIT in challenger.tags:
        stand_in = challenger.tags["validated_by"]
        said += f", by version {stand_in} in the place of {challenger.version}"
    if champion.tags.get("manifest") != challenger.tags.get("manifest"):
        said += " (which was validated on other sequences)"

    if not change <= settings.gate_max_regression:
        return Decision(False, f"refused: {said}, allowed {settings.gate_max_regression:+g}")
    return Decision(True, f"promoted: {said}")


def validation_ne(version: Version) -> dict[str, float]:
    """Normalised entropy on the validation rows, by task, from the version's tags."""
    found = {}
    for key, value in version.tags.items():
        if key.startswith(NE_PREFIX):
            found[key.removeprefix(NE_PREFIX)] = float(value)
    return found

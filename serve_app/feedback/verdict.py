"""Champion against canary by what users did: rates of each task by version, and their difference
with an interval that may be looked at every day.

    served log ─┐ request_id
    events ─────┴→ answers and outcomes of each unit → rates by role → difference, interval

A unit is a user, or a key that the client gave: its answers all come from one version. Units are
independent of each other, answers of one unit are not, so the variance is that of units.

The interval is an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
arXiv:2103.06476, theorem 2.2): with probability 1 - alpha it holds the true difference at all times
at once, however often somebody looks and stops.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from serve_app.ids import id_text
from serve_app.ranking.rollout import CANARY, CHAMPION, in_share
from serve_app.schemas import Event

ALPHA = 0.05
TUNED_UNITS = 1000.0  # effective number of units at which the interval is narrowest
FEWEST_UNITS = 30  # of a version, before anything is said


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """Answers and outcomes of the units of one version."""

    answers: np.ndarray  # float64 [U]
    outcomes: np.ndarray  # float64 [U]

    @property
    def rate(self) -> float:
        """Outcomes per answer."""
        return float(self.outcomes.sum() / self.answers.sum())

    @property
    def variance(self) -> float:
        """Of the rate, over units: a ratio's, by its linear form."""
        num = len(self.answers)
        residual = self.outcomes - self.rate * self.answers
        return float((residual**2).sum() / (num * self.answers.mean()) ** 2)


@dataclass(frozen=True, slots=True)
class TaskVerdict:
    """One task: the canary's rate less the champion's, and what is known of it."""

    task: str
    champion: float
    canary: float
    difference: float
    low: float
    high: float
    says: str  # better, worse or undecided


def interval_width(variance: float, num_units: float, alpha: float = ALPHA) -> float:
    """Half the width of the interval around a difference whose variance is `variance`, from
    `num_units` units.

        units (at TUNED_UNITS = 1000)     100    1,000    10,000
        standard errors, alpha .05       3.86     3.04      3.24
    """
    rho = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / TUNED_UNITS
    grown = num_units * rho + 1
    factor = 2 * grown / (num_units * rho) * math.log(math.sqrt(grown) / alpha)
    return math.sqrt(variance * factor)


def variance_of_difference(champion: UnitCounts, canary: UnitCounts) -> float:
    """The variance of the difference of two rates: the sum of theirs, or what it is where all units
    are alike, if that is more.

    A canary's few units may have done nothing rare yet. Their own variance is 0 then, as if they
    never would:

                   units    likes   variance   of alike units
        champion   19,000      19     5.3e-8
        canary      1,000       0     0          1.0e-6, of the difference
    """
    num_champion, num_canary = len(champion.answers), len(canary.answers)
    apart = champion.variance + canary.variance

    weighted = champion.variance * num_champion**2 + canary.variance * num_canary**2
    of_a_unit = weighted / (num_champion + num_canary)
    alike = of_a_unit * (1 / num_champion + 1 / num_canary)
    return max(apart, alike)


def compare_counts(
    task: str, champion: UnitCounts, canary: UnitCounts, alpha: float = ALPHA
) -> TaskVerdict:
    """The verdict on one task."""
    difference = canary.rate - champion.rate
    fewest = min(len(champion.answers), len(canary.answers))
    half = math.inf
    if fewest >= FEWEST_UNITS:
        num_units = 1 / (1 / len(champion.answers) + 1 / len(canary.answers))
        half = interval_width(variance_of_difference(champion, canary), num_units, alpha)

    low, high = difference - half, difference + half
    says = "undecided"
    if low > 0:
        says = "better"
    elif high < 0:
        says = "worse"
    return TaskVerdict(task, champion.rate, canary.rate, difference, low, high, says)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial has shown so far."""

    versions: dict[str, int]  # by role
    answers: dict[str, int]  # by role
    units: dict[str, int]  # by role
    tasks: list[TaskVerdict]
    p99_ms: dict[str, float]  # of the ranker's passes, by role
    is_slow: bool
    failures: TaskVerdict  # requests without an answer; "better" is more of them

    @property
    def canary_share(self) -> float:
        """Share of the answers."""
        return self.answers[CANARY] / sum(self.answers.values())

    @property
    def fails_more(self) -> bool:
        """True if the canary leaves more requests without an answer, as far as that is certain."""
        return self.failures.low > 0

    def reason_against(self, task: str) -> str | None:
        """Why the canary may not be promoted for `task`, in words; None where it may: `task` is
        better, no other is worse, and it is neither slow nor failing.
        """
        says = {one.task: one.says for one in self.tasks}
        worse = [name for name, said in says.items() if said == "worse"]
        if worse:
            return f"is worse at {', '.join(worse)}"
        if self.fails_more:
            return "leaves more requests without an answer"
        if self.is_slow:
            return f"is too slow: p99 {self.p99_ms[CANARY]:.1f} ms, {self.p99_ms[CHAMPION]:.1f} ms"
        if says[task] != "better":
            return f"is not (yet) better at {task}"
        return None

    def as_figures(self) -> dict[str, Any]:
        """Plain values, for JSON and MLflow."""
        return asdict(self) | {"canary_share": self.canary_share}


def judge_trial(
    served: pa.Table,
    events: Iterable[Event],
    tasks: Sequence[str],
    canary_version: int,
    max_slower: float,
    share: float | None = None,
) -> Verdict | None:
    """The verdict on `canary_version` from the rows of `read_served` and the events; None where one
    of the versions has not answered anybody.

    Only answers from the canary's first one to its last count, and of the champion's those of its
    newest version then. `max_slower` is by how much the p99 of the canary's passes may exceed the
    champion's. With `share`, the canary's of the units, a failure counts for the role that the unit
    is drawn for; without, only of units that also got answers.
    """
    answers = _each_answer_once(served)
    trial = _find_trial(answers, canary_version)
    if trial is None:
        return None

    roles = {CHAMPION: trial.of_champion, CANARY: trial.of_canary}
    outcomes = _outcomes_by_request(events, tasks)
    verdicts = []
    for task in tasks:
        counts = _count_outcomes(answers, roles, outcomes[task])
        verdicts.append(compare_counts(task, counts[CHAMPION], counts[CANARY]))

    # a canary that fails has no later answer, and its failures count all the same
    answered = roles | {CHAMPION: trial.of_champion_since}
    failures = _count_failures(served, answers, answered, canary_version, share)

    num_answers, num_units, p99_ms = {}, {}, {}
    for role, mine in roles.items():
        num_answers[role] = int(mine.sum())
        num_units[role] = len(np.unique(answers["unit"][mine]))
        p99_ms[role] = float(np.percentile(answers["ranker_ms"][mine], 99))

    return Verdict(
        versions={CHAMPION: trial.champion_version, CANARY: canary_version},
        answers=num_answers,
        units=num_units,
        tasks=verdicts,
        p99_ms=p99_ms,
        is_slow=p99_ms[CANARY] > (1 + max_slower) * p99_ms[CHAMPION],
        failures=compare_counts("failures", failures[CHAMPION], failures[CANARY]),
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    """Which answers count, bool [A] each.

    answers       1a 2c 1a 2c 1a     version and role, a champion and c canary: the trial is of 2
    of_canary        x     x
    of_champion         x            between the canary's first and last
    ... since           x     x      the canary's first and later
    """

    champion_version: int
    of_champion: np.ndarray
    of_champion_since: np.ndarray
    of_canary: np.ndarray


def _find_trial(answers: Mapping[str, np.ndarray], canary_version: int) -> _Trial | None:
    """None where one of the versions has not answered anybody."""
    role, version, served_at = answers["role"], answers["version"], answers["served_at"]
    of_canary = (role == CANARY) & (version == canary_version)
    if not of_canary.any():
        return None

    begin_ms, end_ms = served_at[of_canary].min(), served_at[of_canary].max()
    in_trial = (served_at >= begin_ms) & (served_at <= end_ms)
    # the canary itself answers as champion once it is promoted
    of_champions = in_trial & (role == CHAMPION) & (version != canary_version)
    if not of_champions.any():
        return None

    champion_version = int(version[of_champions].max())
    is_champion = (role == CHAMPION) & (version == champion_version)
    return _Trial(
        champion_version=champion_version,
        of_champion=is_champion & in_trial,
        of_champion_since=is_champion & (served_at >= begin_ms),
        of_canary=of_canary,
    )


def _count_outcomes(
    answers: Mapping[str, np.ndarray], roles: Mapping[str, np.ndarray], done: Mapping[str, int]
) -> dict[str, UnitCounts]:
    """Answers and outcomes of each unit, by role; `done` says how many outcomes a request has."""
    outcomes = np.array([done.get(request, 0) for request in answers["request_id"].tolist()])

    counts = {}
    for role, mine in roles.items():
        _, unit = np.unique(answers["unit"][mine], return_inverse=True)
        num_answers = np.bincount(unit).astype(float)
        counts[role] = UnitCounts(num_answers, np.bincount(unit, outcomes[mine]))
    return counts


def _count_failures(
    served: pa.Table,
    answers: Mapping[str, np.ndarray],
    roles: Mapping[str, np.ndarray],
    canary_version: int,
    share: float | None,
) -> dict[str, UnitCounts]:
    """Requests and failed requests of each unit, by role, since the trial began."""
    begin_ms = answers["served_at"][roles[CANARY]].min()
    has_failed = np.array(served["failure"].is_valid()) & ~np.array(served["unit"].is_null())
    has_failed &= np.array(served["served_at"]) >= begin_ms
    failed = served["unit"].filter(pa.array(has_failed)).to_numpy(zero_copy_only=False)

    counts = {}
    for role, mine in roles.items():
        answered = answers["unit"][mine]
        is_mine = np.isin(failed, answered)
        if share is not None:
            drawn = [in_share(unit, canary_version, share) for unit in failed]
            is_mine = np.array(drawn, bool) == (role == CANARY)

        # a row for each answer, then one for each failure
        units = np.concatenate([answered, failed[is_mine]])
        did_fail = np.arange(len(units)) >= len(answered)
        _, unit = np.unique(units, return_inverse=True)
        num_requests = np.bincount(unit).astype(float)
        counts[role] = UnitCounts(num_requests, np.bincount(unit, did_fail.astype(float)))
    return counts


def _each_answer_once(served: pa.Table) -> dict[str, np.ndarray]:
    """A row per answer that has a unit; the log has one per place."""
    first = np.array(served["place"].fill_null(-1)) == 0
    known = ~np.array(served["unit"].is_null())
    kept = served.filter(pa.array(first & known)).drop_columns("failure")
    return {name: kept[name].to_numpy() for name in kept.column_names}


def _outcomes_by_request(
    events: Iterable[Event], tasks: Sequence[str]
) -> dict[str, dict[str, int]]:
    """How many events of each request did what, by task."""
    done: dict[str, dict[str, int]] = {task: {} for task in tasks}
    for event in events:
        request = id_text(event.request_id)
        if request is None:
            continue
        for task in tasks:
            if event.actions.get(task):
                done[task][request] = done[task].get(request, 0) + 1
    return done


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict for a terminal, a line for each task and one for failures."""
    lines = []
    for one in [*verdict.tasks, verdict.failures]:
        lines.append(
            f"{one.task}: champion {one.champion:.5f}, canary {one.canary:.5f}, difference "
            f"{one.difference:+.5f} in [{one.low:+.5f}, {one.high:+.5f}]: {one.says}"
        )
    return lines


def render_page(verdict: Verdict) -> str:
    """The verdict as a page of HTML, complete in itself."""
    rows = []
    for one in [*verdict.tasks, verdict.failures]:
        values = (one.champion, one.canary, one.difference, one.low, one.high)
        cells = "".join(f"<td>{value:.5f}</td>" for value in values)
        rows.append(f"<tr><td>{one.task}</td>{cells}<td>{one.says}</td></tr>")

    roles = []
    for role, version in verdict.versions.items():
        roles.append(
            f"<li>{role}: version {version}, {verdict.answers[role]:,} answers to "
            f"{verdict.units[role]:,} users, p99 of a pass {verdict.p99_ms[role]:.1f} ms</li>"
        )
    warnings = ""
    if verdict.is_slow:
        warnings += "<p><b>The canary is slower than it may be.</b></p>"
    if verdict.fails_more:
        warnings += "<p><b>The canary leaves more requests without an answer.</b></p>"
    return (
        "<!doctype html><meta charset=utf-8><title>Verdict</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:.3em 1em;text-align:right}</style>"
        f"<h1>Canary version {verdict.versions[CANARY]}</h1><ul>{''.join(roles)}</ul>{warnings}"
        "<table><tr><th>task</th><th>champion</th><th>canary</th><th>difference</th>"
        f"<th>from</th><th>to</th><th></th></tr>{''.join(rows)}</table>"
        f"<p>Outcomes per answer. The interval holds the true difference with probability "
        f"{1 - ALPHA:.0%} at all times at once: it may be read every day.</p>"
    )

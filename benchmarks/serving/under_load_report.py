"""benchmarks/runs/serving.json as the section "Serving" of RESULTS.md."""

from pathlib import Path
from typing import Any

from benchmarks.report import table, write_section
from serve_app.web.rank import HOPS

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "serving.json"
PLOT = ROOT / "plots" / "serving.png"


ROWS = {  # part -> what it is
    "reference": "reference",
    "overhead": "trivial model",
    "overhead_apart": "trivial model",
    "rollout": "changes of version, two replicas",
}


def _where(figures: dict[str, Any]) -> str:
    return ", one process" if figures.get("one_process") else ", ingress apart"


def _ms(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['p50']:.1f} / {found['p95']:.1f} / {found['p99']:.1f}"


def _pair(found: dict[str, float]) -> str:
    return f"{found['p50']:.1f} / {found['p99']:.1f}"


def _latencies(run: dict[str, Any]) -> str:
    rows = []
    for name, what in ROWS.items():
        if name in run:
            figures = run[name]
            load = figures["load"]
            rows.append(
                f"| {what}{_where(figures)}, {load['rate']:g}/s for {load['seconds']:g} s, "
                f"{load['candidates']} candidates | "
                f"{_ms(figures['latency_ms'])} | {_ms(figures['ranker_ms'])} | "
                f"{_ms(figures['overhead_ms'])} | "
                f"{figures['failures']} and {figures['statuses'].get('429', 0)} of "
                f"{figures['requests']:,} | "
                f"{figures['others_cores']:.2f} |"
            )
    head = (
        "| ms, p50 / p95 / p99 | whole request | ranker's pass | the rest | failures and 429 | "
        "cores others used |\n"
    )
    return head + "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows)


def _overload(run: dict[str, Any]) -> str:
    figures = run["overload"]
    rows = [
        f"| {name} | {phase['requests']:,} | {phase['answered_per_s']:g} | {phase['refused']:,} | "
        f"{_ms(phase['latency_ms'])} |"
        for name, phase in (
            (name, figures["phases"][name]) for name in ("before", "burst", "after")
        )
    ]
    _, begin, end = figures["load"]["burst"]
    table = (
        "| | requests | answered/s | 429 | ms, p50 / p95 / p99 of the accepted |\n| --- | --- "
        "| --- | --- | --- |\n"
    )
    return (
        f"Overload{_where(figures)}: 20 requests/s, from second {begin:g} to {end:g} five times "
        "the "
        f"{figures['capacity_per_s']:g}/s that the server answers, then 20/s again; the last "
        "refused or slow (twice "
        f"the p99 from before) request came {figures['recovered_after_s']:g} s after the burst; "
        f"{figures['failures']} failures other than 429; a refusal "
        f"took {_ms(figures['refused_ms'])} ms; others used {figures['others_cores']:g} cores.\n\n"
        + table
        + "\n".join(rows)
    )


def _hops(run: dict[str, Any]) -> str:
    """Where the time of a request goes, with the ingress in the ranker's process and apart."""
    figures = run["hops"]
    of_client = {
        "late": "the generator's own, before it sends",
        "network": "client, proxy and sockets, there and back",
    }
    rows = []
    for name, what in {**of_client, **HOPS}.items():
        found = [_pair(figures[way]["hops_ms"][name]) for way in ("together", "apart")]
        rows.append([f"{name}: {what}", *found])
    for way in ("through the proxy", "at the ingress"):
        found = [_pair(figures[of]["route_without_work_ms"][way]) for of in ("together", "apart")]
        rows.append([f"a route without work, {way}", *found])

    load = figures["together"]["load"]
    said = (
        f"A request by its hops, {load['rate']:g}/s for {load['seconds']:g} s, "
        f"{load['candidates']} candidates; ms, p50 / p99 of each by itself, which do not add up."
    )
    return said + "\n\n" + table(["hop", "one process", "ingress apart"], rows)


def _kills(run: dict[str, Any]) -> list[str]:
    """What is killed, and what others see of it."""
    lines = []
    if "two_servers" in run:
        figures = run["two_servers"]
        killed = ", ".join(f"{name} {count}" for name, count in sorted(figures["killed"].items()))
        lines.append(
            f"- Two servers on one machine while processes of both are killed in turn ({killed}): "
            f"{figures['foreign']} answers of the other server among {figures['requests']:,} "
            f"requests ({' and '.join(f'{good:,}' for good in figures['good_answers'])} answered "
            f"200), {figures['foreign_events']} events in the other's store."
        )
    if "killed_ingress" in run:
        figures = run["killed_ingress"]
        kills = figures["kills"]
        lines.append(
            f"- One of two ingresses killed {len(kills)} times under {figures['load']['rate']:g} "
            f"requests/s: {figures['failures']} of {figures['requests']:,} failed, at most "
            f"{max(kill['failed'] for kill in kills)} a kill; the longest request took "
            f"{max(kill['longest_s'] for kill in kills):g} s."
        )
    return lines


def _loads(run: dict[str, Any]) -> list[str]:
    """One user's load on others, and what a process holds."""
    lines = []
    if "heavy_user" in run:
        figures = run["heavy_user"]
        costs = figures["costs_others_ms"]
        lines.append(
            f"- A user with {figures['events']:,} posted events posts one more and ranks, again "
            f"and again ({figures['own_ms']['p50']:g} ms each): in turns without and with that "
            f"user, other users' p50 / p99 are {_pair(figures['others_ms']['without'])} and "
            f"{_pair(figures['others_ms']['with'])} ms: {costs['p50']:g} and {costs['p99']:g} "
            f"more; {figures['others_failures']['with']} of their requests failed."
        )
    if "cache_memory" in run:
        figures = run["cache_memory"]
        lines.append(
            f"- {figures['requests']:,} requests of distinct histories and a cache of "
            f"{figures['cache_mb']} MiB: {figures['counted_mb']:g} MiB more counted in it, "
            f"{figures['resident_mb']:g} MiB more resident "
            f"(x{figures['resident_over_counted']:g}), {figures['rows'][-1]['evictions']:,.0f} "
            "entries evicted."
        )
    if "swaps" in run:
        figures = run["swaps"]
        descriptors, resident = figures["descriptors"], figures["resident_mb"]
        lines.append(
            f"- {figures['swaps']} changes of version: {descriptors[0]} file descriptors before, "
            f"{descriptors[-1]} after (at most {max(descriptors)}); resident memory "
            f"{resident[0]:g} and {resident[-1]:g} MiB."
        )
    return lines


def _events(figures: dict[str, Any]) -> str:
    """What was posted while replicas were killed."""
    outcomes = ""
    if "outcomes" in figures:
        outcomes = (
            f", and {figures['outcomes_lost']} of {figures['outcomes']:,} outcomes posted later "
            "are missing in them"
        )
    return (
        f"- Events: {figures['acknowledged']:,} acknowledged to 8 writers in "
        f"{figures['seconds']:g} s with {figures['replicas_killed']} kills of a replica: "
        f"{figures['acknowledged_and_lost']} lost, {figures['kept_twice']} twice, "
        f"{figures['kept']:,} kept{outcomes}. Answers: {figures['answers']}."
    )


def _lines(run: dict[str, Any]) -> list[str]:
    lines = []
    if "reference" in run:
        lines.append(
            "- Reference load: history cache hit rate "
            f"{run['reference']['history_cache_hit_rate']:.2f}; warm users "
            f"{_ms(run['reference']['warm_latency_ms'])} ms, cold "
            f"{_ms(run['reference']['cold_latency_ms'])} ms."
        )
    for part in ("overhead", "overhead_apart"):
        if part not in run:
            continue
        spent, idle = (
            run[part][key] for key in ("processor_ms_per_request", "routes_without_work_ms")
        )
        lines.append(
            f"- Trivial model{_where(run[part])}: processor time per request {spent['Api']:.2f} "
            "ms in an ingress of "
            f"its own, {spent['RankerReplica']:.2f} ms in the replica (idle threads included); "
            "the generator sent "
            f"{_pair(run[part]['sent_late_ms'])} ms late (p50 / p99). Routes that do nothing: "
            "ingress "
            f"{_pair(idle['ingress'])} ms, ingress and replica {_pair(idle['replica'])} ms."
        )
    if "rollout" in run:
        figures = run["rollout"]
        named = ", ".join(
            f"version {version}: {count}" for version, count in figures["versions"].items()
        )
        lines.append(
            f"- While {'; '.join(figures['done_meanwhile'])}: {figures['failures']} failures, "
            f"answers by {named}."
        )
    if "events" in run:
        lines.append(_events(run["events"]))
    if "malformed" in run:
        figures = run["malformed"]
        lines.append(
            f"- 10,000 malformed bodies over HTTP: {figures['statuses']}, of which "
            f"{figures['answers_that_show_insides']} show the server's insides; a good request "
            "afterwards: "
            f"{figures['good_request_afterwards']}."
        )
    return lines


def section(run: dict[str, Any]) -> str:
    parts = [
        "## Serving",
        f"`make bench-serve` ({run['machine']}; server, generator and Ray on the same cores, other "
        "work\n"
        "on the machine as the last column says): configs/serve_reference.yaml, 1,000 users of "
        "256 events,\n"
        "an untrained model of 4 layers, d = 128, 4 heads; half of the requests from users of the "
        "last minute.\n"
        "They are timed from when they were due, so what the generator is late counts against the "
        "server.",
        _latencies(run),
    ]
    if "reference" in run:
        parts.append("![latency under the reference load](plots/serving.png)")
    if "hops" in run:
        parts.append(_hops(run))
    if "overload" in run:
        parts.append(_overload(run))
    return "\n\n".join([*parts, "\n".join(_lines(run) + _kills(run) + _loads(run))])


def write_report(run: dict[str, Any]) -> None:
    write_section("serving", section(run))

"""The section of RESULTS.md of `benchmarks.training.sharding`, and what it prints at its end."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report import table

ITEM_DIM = 128  # numbers of an item's row
EQUAL = 1e-5  # furthest that losses of sharded tables may be from those of whole ones
RESUMED = 1e-3  # and, relative, those of a run that went on at another number of ranks


def right(found: dict[str, Any]) -> bool:
    """What must hold held, of what was looked at."""
    equal, resumed = found.get("parity"), found.get("resume")
    graphs = found.get("graphs")
    if graphs and not graphs["furthest"] <= EQUAL:
        return False
    if equal:
        close = equal["sharded_from_whole"] <= EQUAL
        if not (close and equal["two_runs_equal"] and equal["host_state_equal"]):
            return False
    return not resumed or max(resumed["one_to_all"], resumed["one_to_all_to_one"]) <= RESUMED


def verdict(found: dict[str, Any]) -> str:
    """What was looked at before anything was timed, in a line."""
    said = []
    if equal := found.get("parity"):
        said.append(f"sharded from whole {equal['sharded_from_whole']:.1e}")
        said.append(f"two runs equal {equal['two_runs_equal']}")
    if resumed := found.get("resume"):
        said.append(f"resumed at {found['ranks']} ranks within {resumed['one_to_all']:.1e}")
        said.append(f"and again at 1 within {resumed['one_to_all_to_one']:.1e}")
    return f"{'right' if right(found) else 'WRONG'}: {', '.join(said) or 'not looked at'}"


def summary(found: dict[str, Any]) -> str:
    """A row for each case whose steps were timed, the balances of loads apart."""
    rows = []
    for name, case in found["cases"].items():
        if "step_ms" not in case or "imbalance" in case:
            continue
        of_one = times_one_rank(found["cases"], name)
        sent = sum(case["mb_sent_a_step"].values())
        tables = sum(place["weight_bytes"] for place in case["tables"].values()) / 2**30
        cells = (
            f"{case['step_ms']:.1f}",
            f"{case['tokens_per_s']:,.0f}",
            "–" if of_one is None else f"**{of_one:.2f}x**",
            # runs from before they were counted
            _share(case.get("message_wait_share")),
            _share(case["data_wait_share"]),
            f"{sent:.1f}",
            "–" if "messages_a_step" not in case else f"{case['messages_a_step']:.1f}",
            "–" if not case["tables"] else f"{tables:.2f}",
            "–" if case["peak_gb"] is None else f"{case['peak_gb']:.1f}",
        )
        rows.append([name, *cells])
    header = [
        "",
        "ms a step",
        "tokens/s",
        "of one rank's",
        "waiting for messages",
        "for data",
        "MB sent a rank and step",
        "messages",
        "GB of tables a rank",
        "peak GB",
    ]
    return table(header, rows)


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def times_one_rank(cases: dict[str, dict[str, Any]], name: str) -> float | None:
    """Tokens/s over those of one rank with the same data, or with the largest table that one rank
    holds; None where there is no such case.
    """
    if not name.startswith("all ranks"):
        return None
    alone = {}
    for other, case in cases.items():
        if other.startswith("1 rank, "):
            alone[other.removeprefix("1 rank, ")] = case["tokens_per_s"]

    same = [speed for data, speed in alone.items() if data in name]
    tables = [speed for data, speed in alone.items() if "table" in data and "table" in name]
    of_one = same or tables
    return cases[name]["tokens_per_s"] / of_one[-1] if of_one else None


def section(runs: list[dict[str, Any]]) -> str:
    """Of several runs on one machine: every killed rank, what else was compared of the first that
    did, and the times of each.
    """
    machine = runs[0]["environment"]
    commands = dict.fromkeys(found["command"] for found in runs)
    parts = [
        "## Sharded tables",
        f"{', '.join(f'`{command}`' for command in commands)}: "
        f"{machine['device']}, {runs[0]['ranks']} ranks, {machine['cores']} cores, torch "
        f"{machine['torch']}.",
    ]
    parts += [killed_text(found["killed"]) for found in runs if "killed" in found]
    sentences = {"parity": equal_text, "resume": resumed_text, "graphs": graphs_text}
    for name, sentence in sentences.items():
        compared = next((found[name] for found in runs if name in found), None)
        if compared:
            parts.append(sentence(compared))
    for found in runs:
        if found.get("cases"):
            parts += times(found)
    return "\n\n".join(parts)


def equal_text(equal: dict[str, Any]) -> str:
    return (
        "Sharded tables against whole ones over 50 steps: losses differ by "
        f"{equal['sharded_from_whole']:.1e} at "
        f"most (by {equal['sharded_from_one_rank']:.1e} from one rank's); two runs equal: "
        f"{equal['two_runs_equal']}"
        "; moments on the host equal to the device's bit for bit: "
        f"{equal['host_state_equal']}; bfloat16 item rows "
        f"move a loss by {equal['bf16_rows_from_float32']:.1e}."
    )


def resumed_text(resumed: dict[str, Any]) -> str:
    return (
        "One rank's run gone on by all ranks, and then by one again (a table of "
        f"{resumed['table_gb']:g} GB): "
        f"losses within {resumed['one_to_all']:.1e} and {resumed['one_to_all_to_one']:.1e} of "
        "the unbroken run's."
    )


def graphs_text(graphs: dict[str, Any]) -> str:
    return (
        "Steps of all ranks as CUDA graphs against launched ones over 50 steps: losses differ by "
        f"{graphs['furthest']:.1e} at most."
    )


def killed_text(found: dict[str, Any]) -> str:
    before, after = found["ranks"]
    again = f"gone on by {after} instead of {before}"
    compared = f"losses within {found['furthest']:.1e} of the unbroken run's"
    if before == after:
        again = "all started again"
        compared += f", equal bit for bit: {found['equal']}"
    return (
        f"A rank killed in step {found['killed_at']} of {found['steps']} (SIGKILL), {again} "
        f"from the checkpoint of step {found['resumed_at']}: {compared}."
    )


def times(found: dict[str, Any]) -> Iterator[str]:
    """What the cases of one run took."""
    sizes, cases = found["sizes"], found["cases"]
    yield (
        f"**{sizes['events']:,} events a rank** in histories of {sizes['length']:,}, "
        f"{sizes['layers']} layers, "
        f"d = {sizes['heads'] * sizes['width']}, item rows of {ITEM_DIM}, medians of the lines of "
        f"{sizes['steps']} "
        "steps of the training loop" + (f" ({found['note']}):" if "note" in found else ":")
        # what is to be known of a run, written into its file by hand
    )
    yield summary(found)

    for name, messages in cases.items():
        if name.startswith("messages alone, "):
            yield (
                f"The messages by themselves ({name.removeprefix('messages alone, ')}): "
                f"{messages['fetch_ms']:.2f} ms to fetch {messages['distinct_rows']:,} rows, "
                f"{messages['gradients_ms']:.2f} ms to send their gradients."
            )

    loads = {name: case for name, case in cases.items() if "imbalance" in case}
    if loads:
        yield (
            "Stochastic length over users of Zipf lengths (alpha 1.6, as many passes a step), by "
            "`train.stochastic_length.balance`. Imbalance: tokens of a step's heaviest rank over "
            "the mean rank's, counted over 200 steps."
        )
        yield load_table(loads)
        yield from measured_time(loads)


def measured_time(loads: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The times that loads were dealt by, where they were measured."""
    for case in loads.values():
        if "load_times_us" in case:
            once, each, squared = case["load_times_us"]
            yield (
                "Measured before (`train.stochastic_length.load_times`): "
                f"{once:.3g} µs an example, {each:.3g} µs a token, "
                f"{squared:.3g} µs a token times the tokens."
            )


def load_table(loads: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, case in loads.items():
        cells = (
            f"{case['imbalance']:.3f}",
            f"{case['worst_imbalance']:.3f}",
            f"{case['tokens_a_step']:,.0f}",
            f"{case['step_ms']:.1f}",
            f"{case['tokens_per_s']:,.0f}",
            _share(case["message_wait_share"]),
            _share(case["data_wait_share"]),
        )
        rows.append([name.removeprefix("loads: "), *cells])
    header = ["", "imbalance, mean", "worst step", "tokens a step", "ms a step", "tokens/s"]
    return table([*header, "waiting for messages", "for data"], rows)

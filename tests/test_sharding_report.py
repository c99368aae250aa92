"""The report of several GPUs: over which run of one rank a case stands, and the loads apart."""

import argparse
from types import SimpleNamespace
from typing import Any

from benchmarks.training import sharding
from benchmarks.training.sharding_report import section, times_one_rank


def case(tokens_per_s: float, **more: object) -> dict:
    times = {"step_ms": 10.0, "data_wait_share": 0.0, "message_wait_share": 0.01, "peak_gb": None}
    sent = {"mb_sent_a_step": {"all_reduce": 4.0}, "messages_a_step": 2.0, "tables": {}}
    return {"tokens_per_s": tokens_per_s, **times, **sent, **more}


CASES = {
    "1 rank, loader": case(100.0),
    "all ranks, loader": case(190.0),
    "1 rank, small table": case(50.0),
    "1 rank, table of 20 GB": case(40.0),
    "all ranks, table of 20 GB sharded": case(80.0),
    "all ranks, table of 100 GB sharded": case(60.0),
    "loads: none": case(70.0, imbalance=1.2, worst_imbalance=1.5, tokens_a_step=64.0),
    "loads: dealing by measured time": case(
        80.0,
        imbalance=1.01,
        worst_imbalance=1.02,
        tokens_a_step=64.0,
        load_times_us=[2.0, 0.25, 0.0],
    ),
}


def test_a_case_is_held_against_one_rank_with_its_data_or_the_largest_table_of_one() -> None:
    found = {name: times_one_rank(CASES, name) for name in CASES}
    assert found["all ranks, loader"] == 1.9
    assert found["all ranks, table of 20 GB sharded"] == 2.0
    assert found["all ranks, table of 100 GB sharded"] == 1.5
    assert found["1 rank, loader"] is None
    assert found["loads: none"] is None


def test_loads_have_a_table_of_their_own() -> None:
    sizes = {"events": 64, "length": 8, "layers": 1, "heads": 1, "width": 16, "steps": 10}
    machine = {"device": "a GPU", "cores": 2, "torch": "2"}
    run = {"command": "it", "environment": machine, "ranks": 2, "sizes": sizes, "cases": CASES}
    killed = {"steps": 50, "killed_at": 25, "resumed_at": 20, "equal": False}
    killed |= {"ranks": [2, 1], "furthest": 6.5e-8}
    again = killed | {"ranks": [2, 2], "furthest": 0.0, "equal": True}
    attempts = [{"command": "kill", "killed": found} for found in (killed, again)]
    text = section([run, *attempts])
    assert "| none | 1.200 | 1.500 | 64 | 10.0 | 70 | 1.0% | 0.0% |" in text
    assert "| dealing by measured time | 1.010 |" in text
    assert "2 µs an example, 0.25 µs a token, 0 µs a token times the tokens" in text
    assert "killed in step 25 of 50 (SIGKILL), gone on by 1 instead of 2 from" in text
    assert "losses within 6.5e-08 of the unbroken run's." in text
    assert "all started again from the checkpoint of step 20: losses within 0.0e+00" in text
    assert "equal bit for bit: True" in text
    assert "| loads: none" not in text


def test_the_table_that_no_rank_holds_alone_comes_last() -> None:
    options = argparse.Namespace(**sharding.TINY, only=["tables"], most_gb=40.0)
    options.table_gb = [100.0, 20.0]
    two: Any = SimpleNamespace(size=2, rank=0, device="cpu")
    names = [name for name, _ in sharding.cases(options, two)]
    assert names == [
        "1 rank, table of 20 GB",
        "all ranks, table of 20 GB sharded",
        "messages alone, table of 20 GB",
        "all ranks, table of 100 GB sharded",
        "messages alone, table of 100 GB",
    ]

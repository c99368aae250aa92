"""Lines of the retrieval benchmarks become files of figures, and these a section of RESULTS.md."""

import argparse
from pathlib import Path

import pytest

from benchmarks.quality.retrieval_choice import first_commands, second_commands
from benchmarks.quality.retrieval_draws import DRAWS, chosen_draw, finalists, tried_draws
from benchmarks.quality.retrieval_merge import merge_lines
from benchmarks.quality.retrieval_report import (
    choice_part,
    kuairand_part,
    measured_section,
    softmax_part,
)
from benchmarks.report import read_run, write_run

QUALITY = {"hr_10": 0.3, "hr_50": 0.5, "mrr": 0.1, "coverage_10": 0.4, "seconds": 9.0}


def ml1m_line(name: str, seed: int, ndcg: float, *, split: str = "test", end: bool = True) -> dict:
    facts = {"name": name, "seed": seed, "split": split, "epoch": 1, "set": {}, "end": end}
    return facts | QUALITY | {"train_tflop": 2.0, "ndcg_10": ndcg}


def kuairand_line(name: str, seed: int, ndcg: float) -> dict:
    line = {"name": name, "seed": seed, "split": "test", "epochs": 4, "validation": {"4": 0.1}}
    line |= {"set": [], "seconds": 7.0}
    for model in ("", "popularity/", "item_knn/"):
        for key in ("hr_10", "recall_50", "mrr", "coverage_10"):
            line[f"test/{model}{key}"] = 0.25
        line[f"test/{model}ndcg_10"] = ndcg
    return line | {"test/auc/is_click": 0.75, "test/users": 1200}


def test_lines_go_to_their_files_and_replace_what_was_there(tmp_path: Path) -> None:
    lines = [
        ml1m_line("sasrec", 0, 0.11, end=False),
        ml1m_line("sasrec", 0, 0.12),
        ml1m_line("sasrec", 0, 0.13, split="val"),
        ml1m_line("memory_xbm_4k_64", 0, 0.14) | {"memory_cosine": 0.9},
        kuairand_line("ultra_hstu", 0, 0.15),
    ]
    added = merge_lines(lines, "a GPU", tmp_path)
    files = ("retrieval_ml1m", "retrieval_ml1m_val", "retrieval_memory", "retrieval_kuairand")
    assert added == dict.fromkeys(files, 1)

    merge_lines([ml1m_line("sasrec", 0, 0.16), ml1m_line("sasrec", 1, 0.18)], "a GPU", tmp_path)
    section = measured_section(tmp_path)
    assert "| SASRec, 2 layers | 2 | 0.3000 ± 0.0000 | 0.1700 ± 0.0141 |" in section


def test_each_part_shows_what_was_measured(tmp_path: Path) -> None:
    lines = [ml1m_line("sasrec", 0, 0.12)]
    for seed in range(2):
        lines += [ml1m_line("memory_none_64", seed, 0.30), ml1m_line("memory_none_512", seed, 0.30)]
        drift = {"memory_cosine": 0.87}
        lines.append(ml1m_line("memory_axbn_4k_64", seed, 0.31 + seed / 50) | drift)
        lines.append(ml1m_line("memory_axbn_4k_512", seed, 0.29) | drift)
        lines.append(kuairand_line("ultra_hstu", seed, 0.05))
    lines.append(kuairand_line("ranking", 0, 0.0) | {"test/auc/is_click": 0.7511})
    for task in ("long_view", "is_like", "is_profile_enter"):
        lines[-1][f"test/auc/{task}"] = 0.8
    merge_lines(lines, "a GPU", tmp_path)

    softmax = {"machine": {"device": "a GPU", "torch": "2", "triton": "3"}}
    softmax["full, float32"] = {
        "ours": {"error": 1e-6, "ms": 12.345, "peak_gb": 0.5, "items": 9},
        "PyTorch": {"error": 0.5, "items": 9},
    }  # fmt: skip
    write_run(tmp_path / "retrieval_softmax.json", softmax)

    section = measured_section(tmp_path)
    assert "| 64 | 4k |  | 0.3000 ± 0.0000 (2) |  |  | 0.3200 ± 0.0141 (2) |" in section
    assert "AXBN in 1 of 2" in section
    assert "| 64 | 4k |  |  | 0.87 |" in section
    draw = "| ULTRA-HSTU | 0.5 | 0.05 | 0.05 | 2e-3 | 8e-3 | 2 | 0.1000 | 2 |"
    assert f"{draw} 0.2500 ± 0.0000 | 0.0500 ± 0.0000 |" in section
    assert "| ranking alone | 1 | 0.7511 | 0.8000 |" in section
    assert "| full, float32 | ours | 12.35 | 0.500 | 1e-06 |" in section
    assert "| full, float32 | PyTorch | not timed |  | 5e-01 |" in section


def test_validation_chooses_between_settings_of_a_model() -> None:
    """Not the test period, on which the other of the two is better here."""
    lines = [kuairand_line("sasrec", 0, 0.05)]
    for dropout, validation, test in (("0.5", 0.06, 0.09), ("0.1", 0.07, 0.08)):
        line = kuairand_line("hstu_merged", 0, test) | {"validation": {"2": 0.01, "4": validation}}
        line["set"] = ["train.precision=bf16"]
        if dropout != "0.5":
            line["set"].append(f"features.item_id_dropout={dropout}")
        lines.append(line)

    shown = kuairand_part({"runs": lines})
    first, second = (shown.index(f"| HSTU, merged actions | {x} |") for x in ("0.1", "0.5"))
    assert first < second
    assert "as chosen on validation: HSTU, merged actions 0.0800, SASRec 0.0500." in shown


def test_what_was_tried_for_a_length_is_a_table(tmp_path: Path) -> None:
    chosen = {"epochs": 20, "train": {"embedding_lr": 0.004}}
    lines = [ml1m_line("ultra_200", 0, 0.18, split="val") | {"set": chosen}]
    wide = {"position_buckets": 2000, "attention": {"window": 100, "full_rows": 0}}
    lines.append(
        lines[0] | {"name": "ultra_2000", "ndcg_10": 0.19, "set": {**chosen, "model": wide}}
    )
    lines.append(ml1m_line("ultra_2000", 0, 0.2, split="val"))  # of another budget
    merge_lines([*lines, ml1m_line("sasrec", 0, 0.12)], "a GPU", tmp_path)
    section = measured_section(tmp_path)
    assert "| 2000 | 2000 | 100 | 0 | 0.3000 | 0.1900 |" in section
    assert "| 200 | 200 | 200 | 200 | 0.3000 | 0.1800 |" in section
    assert "0.2000" not in section


def test_ours_and_sasrec_differ_by_so_much() -> None:
    """Seeds .06, .08 and .05, .05: means .07 and .05, standard errors .01 and 0."""
    lines = []
    for seed, (ours, sasrec) in enumerate(((0.06, 0.05), (0.08, 0.05))):
        lines += [kuairand_line("ultra_hstu", seed, ours), kuairand_line("sasrec", seed, sasrec)]
    shown = kuairand_part({"runs": lines})
    assert "The difference is +0.0200, its standard error 0.0100." in shown


def choice_line(name: str, seed: int, draw: tuple[str, ...], ndcg: float) -> dict:
    line = {"name": name, "seed": seed, "split": "val", "epochs": 4, "seconds": 7.0}
    return line | {"validation": {"2": 0.01, "4": ndcg}, "set": ["train.precision=bf16", *draw]}


def test_the_second_seed_decides_between_the_best_draws(tmp_path: Path) -> None:
    """Of draws 0.06, 0.09, 0.08 and 0.07 the two best have it, and the third is ahead with it."""
    lines = []
    for draw, ndcg in zip(DRAWS, (0.06, 0.09, 0.08, 0.07), strict=False):
        lines.append(choice_line("sasrec", 0, draw, ndcg))
    assert finalists(tried_draws(lines, "sasrec")) == [DRAWS[1], DRAWS[2]]

    lines += [choice_line("sasrec", 1, DRAWS[1], 0.01), choice_line("sasrec", 1, DRAWS[2], 0.08)]
    lines.append(choice_line("hstu_merged", 0, DRAWS[3], 0.05))
    merge_lines(lines, "a GPU", tmp_path)
    runs = read_run(tmp_path / "retrieval_kuairand_choice.json")["runs"]
    assert chosen_draw(tried_draws(runs, "sasrec")) == DRAWS[2]

    shown = choice_part({"runs": runs})
    assert "| 0.1 | 0.05 | 0.05 | 2e-3 | 8e-3 | 2 | 0.0500 (2) |  |" in shown
    assert "| 0.1 | 0.2 | 0.05 | 2e-3 | 8e-3 | 2 | **0.0800 (2)** |  |" in shown
    assert "| 0.2 | 0.1 | 0.05 | 2e-3 | 8e-3 | 2 | 0.0700 (1) | **0.0500 (1)** |" in shown


def test_only_what_is_missing_is_trained_for_the_choice() -> None:
    options = argparse.Namespace(names=["sasrec"], split="val", config="a.yaml", runs_dir="runs")
    options.name, options.device, options.set = "kuairand", "cpu", ["train.precision=bf16"]
    lines = [choice_line("sasrec", 0, draw, 0.01) for draw in DRAWS[:-1]]
    (command,) = first_commands(options, lines)
    assert command[-len(DRAWS[-1]) :] == list(DRAWS[-1])
    assert command[command.index("--seeds") + 1] == "0"

    lines.append(choice_line("sasrec", 0, DRAWS[-1], 0.02))
    lines.append(choice_line("sasrec", 1, DRAWS[-1], 0.02))
    assert first_commands(options, lines) == []
    # of the two best draws the other one
    (command,) = second_commands(options, lines)
    assert command[command.index("--seeds") + 1] == "1"
    assert command[command.index("--set") + 1 :] == ["train.precision=bf16", *DRAWS[0]]


def test_ours_stands_beside_the_fastest_other() -> None:
    softmax: dict = {"machine": {"device": "a GPU", "torch": "2", "triton": "3"}}
    times = {"ours": 9.0, "ours, TF32": 3.0, "chunked PyTorch": 4.0, "PyTorch": 60.0, "peer": 7.5}
    sizes = {"ours, TF32": 1.0, "PyTorch": 20.0}
    softmax["sampled, float32"] = {
        name: {"error": 1e-6, "ms": ms, "peak_gb": sizes.get(name, 2.0)}
        for name, ms in times.items()
    }
    softmax["full, float32"] = {"ours": {"error": 0.5}}  # wrong, and so not timed
    shown = softmax_part(softmax)
    assert "`ours, TF32` is 2.50x as fast as `peer`, with 5.0% of PyTorch's memory." in shown
    assert "- full" not in shown


def test_what_is_not_measured_has_no_part(tmp_path: Path) -> None:
    merge_lines([ml1m_line("sasrec", 0, 0.12)], "a GPU", tmp_path)
    assert "###" not in measured_section(tmp_path)
    with pytest.raises(FileNotFoundError):
        measured_section(tmp_path / "nothing")

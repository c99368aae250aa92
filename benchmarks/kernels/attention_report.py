"""The attention section of RESULTS.md and its figure, from the JSON that
`benchmarks.kernels.attention` wrote.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.report import parity_told, write_section

ROOT = Path(__file__).parents[1]
LENGTHS = (1024, 2048, 4096, 8192, 16384)
GOALS = {  # by length, forward and backward
    "semi-local": {
        1024: "0.16 / 0.48",
        4096: "0.20 / 0.59",
        8192: "0.205 / 0.61",
        16384: "0.17 / 0.48",
    },
    "semi-local, prefix of 4": {16384: "0.175 / 0.52"},
    "causal": {
        1024: "0.175 / 0.56",
        4096: "0.56 / 1.80",
        8192: "1.05 / 3.45",
        16384: "1.75 / 5.6",
    },
}
TITLES = {
    "semi-local": "**ours, semi-local** (window 256, full rows 256)",
    "semi-local, prefix of 4": "ours, semi-local with a prefix of 4",
    "causal": "**ours, causal**",
    "flex semi-local": "flex_attention (softmax), the semi-local mask",
    "cuDNN causal": "SDPA cuDNN (softmax), causal",
    "flash causal": "SDPA flash (softmax), causal",
}


def _time(numbers: dict, way: str) -> str:
    """0.193 (0.191–0.196), without the interval where none was measured."""
    shown = f"{numbers[f'{way}_ms']:.3f}"
    interval = numbers.get(f"{way}_range_ms")
    if interval is None:
        return shown
    low, high = interval
    return f"{shown} ({low:.3f}–{high:.3f})"


def _pair(numbers: dict | None) -> str:
    if numbers is None:
        return "–"
    return f"{_time(numbers, 'forward')} / {_time(numbers, 'backward')}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(run: dict) -> str:
    everything = {**run["ours"], **run["softmax"], **run["flex"]}
    rows = []
    for kind, title in TITLES.items():
        if not any(f"{kind} {n}" in everything for n in LENGTHS):
            continue
        rows.append([title, *(_pair(everything.get(f"{kind} {n}")) for n in LENGTHS)])
        if kind in GOALS:
            rows.append(["goal", *(GOALS[kind].get(n, "–") for n in LENGTHS)])
            rates = [everything[f"{kind} {n}"] for n in LENGTHS]
            shown = [f"{r['forward_tflops']:.0f} / {r['backward_tflops']:.0f}" for r in rates]
            rows.append(["TFLOP/s over kept pairs", *shown])
    return _table(["forward / backward, ms", *(f"L={n:,}" for n in LENGTHS)], rows)


def other_table(run: dict) -> str:
    shown = {f"{kind} {n}" for kind in TITLES for n in LENGTHS}
    rows = [
        [
            name,
            _time(r, "forward"),
            _time(r, "backward"),
            f"{r['forward_tflops']:.0f} / {r['backward_tflops']:.0f}",
        ]
        for name, r in run["ours"].items()
        if name not in shown
    ]
    return _table(["case", "forward ms", "backward ms", "TFLOP/s"], rows)


def cpu_table(run: dict) -> str:
    rows = [
        [
            name,
            f"{r['torch']:,.0f}",
            f"{r['reference']:,.0f}",
            f"{r['torch'] / r['reference']:.1f}x",
        ]
        for name, r in run["cpu"].items()
    ]
    return _table(["CPU, semi-local, forward + backward, events/s", "blocked", "dense", ""], rows)


def plot(run: dict, path: Path) -> None:
    everything = {**run["ours"], **run["softmax"], **run["flex"]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, way in zip(axes, ("forward_ms", "backward_ms"), strict=True):
        for kind, title in TITLES.items():
            points = [
                (n, everything[f"{kind} {n}"][way]) for n in LENGTHS if f"{kind} {n}" in everything
            ]
            if not points:
                continue
            ours = title.startswith("**")
            line = "-o" if ours else "--s"
            axis.plot(
                *zip(*points, strict=True),
                line,
                label=title.replace("**", ""),
                linewidth=2.2 if ours else 1.2,
            )
        axis.set(
            xscale="log", yscale="log", xlabel="sequence length", title=way.replace("_ms", ", ms")
        )
        axis.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
        axis.minorticks_off()
        axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    device = run["machine"]["device"]
    figure.suptitle(f"65,536 tokens, 4 heads of 128, bfloat16, one {device}")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def section(run: dict) -> str:
    machine, cached, slope = run["machine"], run["cached"], run["per_user_slope"]
    ratios = ", ".join(
        f"{name.replace('_ms', '')} {value:.3f}" for name, value in run["over_cudnn"].items()
    )
    lists = ", ".join(f"{name} {ms:.3f} ms" for name, ms in run["lists"].items())
    host = ", ".join(f"{name} {us:.0f}" for name, us in run["host_us"].items())
    ceilings = run["ceilings"]
    versions = f"one {machine['device']}, torch {machine['torch']}, triton {machine['triton']}"
    parity = parity_told(run["parity"])
    rates = (
        f"copy {ceilings['copy_tb_s']:.2f} TB/s, bfloat16 GEMM {ceilings['gemm_tflops']:.0f} "
        "TFLOP/s"
    )
    intervals = ""
    if "forward_range_ms" in run["ours"]["semi-local 16384"]:
        intervals = " (in brackets what 10 and 90 % of 30 runs do not pass; a column's take turns)"
    return f"""## Semi-local attention

`python -m benchmarks.kernels.attention`, {versions}: 65,536 tokens a batch, 4 heads, d_qk = d_v \
= 128 unless said, bfloat16,
medians with the L2 flushed{intervals}, all in one run after {parity}. Ceilings of the machine in \
the same run: {rates}.
What was tried, and why a goal is missed, is in [NOTES.md](NOTES.md).

{main_table(run)}

![times against sequence length](plots/attention.png)

Over cuDNN causal at 16,384 of the same run: {ratios}.
Time per user grows from 1,024 to 16,384 with a log-log slope of {slope["forward_ms"]:.2f} \
forward and
{slope["backward_ms"]:.2f} backward (1 is linear).

{other_table(run)}

On a CPU (`python -m benchmarks.kernels.attention --cpu`, one thread of an AMD EPYC, 2 heads of \
32, float32, processor time):

{cpu_table(run)}

- Cached attention, 32 users, 1,024 candidates each over 16,384 cached keys: {cached["ms"]:.2f} ms,
  {cached["tflops"]:.0f} TFLOP/s; one user, 100 candidates: \
{cached["one user, 100 candidates, ms"]:.3f} ms.
- Building a tile list on the device: {lists}.
- Host, µs a call: {host}."""


def write_report(runs: list[dict]) -> None:
    """Sections of later runs replace those of earlier ones."""
    run: dict = {}
    for other in runs:
        run |= other
    plot(run, ROOT / "plots" / "attention.png")
    write_section("attention", section(run))

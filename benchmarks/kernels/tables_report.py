"""The tables section of RESULTS.md, from the JSON that `benchmarks.kernels.tables` wrote."""

from pathlib import Path

from benchmarks.report import parity_told, widest_interval, write_section

ROOT = Path(__file__).parents[1]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def int4_table(run: dict) -> str:
    rows = []
    for dim, numbers in run["int4"].items():
        rates = numbers["gb_s"]
        look_up, same = rates["look-up"], rates["gather of the same bytes"]
        rows.append(
            [
                dim,
                f"{numbers['bytes_per_row']} (bfloat16: {2 * int(dim)})",
                f"{numbers['times']['look-up']['ms']:.3f}",
                f"{look_up:,.0f}",
                f"{same:,.0f}",
                f"{look_up / same:.0%}",
                f"{rates['index_select of packed rows']:,.0f}",
                f"{rates['index_select of bfloat16 rows']:,.0f}",
                f"{numbers['times']['plain PyTorch']['ms']:.2f}",
            ]
        )
    header = [
        "width",
        "bytes a row",
        "look-up, ms",
        "GB/s",
        "gather of the same bytes, GB/s",
        "share",
    ]
    return _table(
        [*header, "index_select, packed", "index_select, bfloat16", "plain PyTorch, ms"], rows
    )


def adamw_table(run: dict) -> str:
    copy = run["ceilings"]["copy"]["copy_tb_s"]
    rows = []
    for name, numbers in run["adamw"]["1M gradients of 128"].items():
        if "tb_s" not in numbers:
            continue
        shown = f"{numbers['ms']:.3f}", f"{numbers['tb_s']:.2f}", f"{numbers['tb_s'] / copy:.0%}"
        state = f"{numbers['state_bytes_per_float']:.2f}"
        rows.append([name, f"{numbers['touched']:,}", *shown, f"{numbers['plain_ms']:.2f}", state])
    header = [
        "ids",
        "rows touched",
        "ms",
        "TB/s",
        "of the copy",
        "plain PyTorch, ms",
        "state, bytes a float",
    ]
    return _table(header, rows)


def softmax_table(run: dict) -> str:
    rows = []
    for name, numbers in run["softmax"].items():
        ours, plain = numbers["triton"], numbers["reference"]
        rows.append(
            [
                name,
                f"{ours['forward_ms']:.2f} / {ours['both_ms']:.2f}",
                f"{plain['forward_ms']:.2f} / {plain['both_ms']:.2f}",
                f"{numbers['faster']:.1f}x",
                f"{ours['peak_gb']:.2f}",
                f"{plain['peak_gb']:.2f}",
                f"{numbers['memory_share']:.1%}",
            ]
        )
    header = [
        "",
        "forward / with backward, ms",
        "plain PyTorch",
        "faster",
        "peak GB",
        "plain, GB",
        "share",
    ]
    return _table(header, rows)


def jagged_table(run: dict) -> str:
    copy, found = run["ceilings"]["copy"]["copy_tb_s"], run["jagged"]["rows of 512"]
    rows = []
    for name, ours in found.items():
        if name.endswith(", triton"):
            case = name.removesuffix(", triton")
            plain = found[f"{case}, torch"]
            rates = f"{ours['tb_s']:.2f}", f"{ours['tb_s'] / copy:.0%}"
            rows.append([case, f"{ours['ms']:.3f}", *rates, f"{plain['ms']:.3f}"])
    return _table(["op, sequences", "ms", "TB/s", "of the copy", "plain PyTorch, ms"], rows)


def section(run: dict) -> str:
    machine = run["machine"]
    versions = f"one {machine['device']}, torch {machine['torch']}, triton {machine['triton']}"
    sort = run["adamw"]["1M gradients of 128"]["sort alone"]["ms"]
    timed = {part: run[part] for part in ("int4", "adamw", "softmax", "jagged")}
    return f"""## Tables, optimizer, sampled softmax, jagged rows

`python -m benchmarks.kernels.tables`, {versions}: medians of 20 to 30 runs with the L2 flushed, \
ours and what stands beside
it in turns, after {parity_told(run["parity"])}. 10 and 90 % of the runs lie at most \
{widest_interval(timed):.0%} from their median.
A copy moved {run["ceilings"]["copy"]["copy_tb_s"]:.2f} TB/s in the same run.

**INT4 look-up**, 1M random rows of a table far above the L2, dequantised to bfloat16. Bytes are \
the packed rows read
and the rows written; "gather of the same bytes" is the look-up's access pattern without its \
arithmetic.

{int4_table(run)}

**Row-wise AdamW**, 1M gradients of 128 floats into a table of 4M rows, sorting included \
({sort:.3f} ms of it). Bytes
are each gradient once, and each touched row and its state in and out once. The state is what the \
optimizer adds to a
float of the table.

{adamw_table(run)}

**Sampled softmax**, 65,536 positions, 512 negatives, width 64.

{softmax_table(run)}

**Jagged rows** of 512 bfloat16, 262,144 in all.

{jagged_table(run)}"""


def write_report(runs: list[dict]) -> None:
    """Sections of later runs replace those of earlier ones."""
    run: dict = {}
    for other in runs:
        run |= other
    write_section("tables", section(run))

"""The layer's section of RESULTS.md, from the JSON that `benchmarks.kernels.layer` wrote."""

from benchmarks.report import parity_told, table, widest_interval, write_section

LENGTHS = (16384, 8192, 4096, 2048)
ZIPF = "Zipf, candidates, dropout"  # lengths 16,384 / rank, in training 10 % of the gate dropped
AUTHORS = {4096: "1.453 / 7.917", 16384: "3.428 / 22.374"}
GOALS = {"bf16, all recompute": "0.57 / –", "FP8, all recompute": "0.50 / –"}  # at 16,384


def layer_table(run: dict) -> str:
    batches = [*(str(n) for n in sorted(LENGTHS)), ZIPF]
    names = dict.fromkeys(name.removesuffix(f" {ZIPF}") for name in run["layer"] if ZIPF in name)
    published = [AUTHORS.get(n, "") for n in sorted(LENGTHS)]
    rows = [["authors' Triton layer, causal, as they publish it", *published, "", ""]]
    for name in names:
        cases = [run["layer"][f"{name} {of_batch}"] for of_batch in batches]
        times = [f"{c['inference_ms']:.3f} / {c['forward_backward_ms']:.3f}" for c in cases]
        kept = run["layer"][f"{name} 16384"]["kept_mb"]
        shown = f"**{name}**" if name in GOALS else name
        rows.append([shown, *times, f"{kept:.0f}"])
        if name in GOALS:
            rows.append(["goal", "", "", "", GOALS[name], "", ""])
    lengths = [f"L={n:,}" for n in sorted(LENGTHS)]
    header = ["inference / forward + backward, ms", *lengths, ZIPF, "kept for backward, MB"]
    return table(header, rows)


def fp8_table(run: dict) -> str:
    names = {
        "addmm_ms": "`torch.addmm(residual, x, w)`, bfloat16, no bias",
        "triton_bf16_ms": "our product, bfloat16, bias and residual",
        "fp8_ms": "our product, FP8, bias and residual",
        "fp8_with_quantise_ms": "… and what quantising adds to norm + gate",
        "fp8_quantise_apart_ms": "… after a pass that quantises",
        "scaled_mm_and_add_ms": "`torch._scaled_mm` with bias, then the residual",
        "gate_addmm_ms": "norm + gate, then addmm",
        "gate_fp8_ms": "norm + gate + quantise, then our FP8 product",
    }
    widths = list(run["fp8"])
    rows = [[text, *(f"{run['fp8'][w][key]:.3f}" for w in widths)] for key, text in names.items()]
    gains = [run["fp8"][w]["addmm_ms"] / run["fp8"][w]["fp8_with_quantise_ms"] for w in widths]
    rows.append(
        ["**addmm over FP8 with quantising** (goals 1.25x, 1.5x)", *(f"{g:.2f}x" for g in gains)]
    )
    together = [run["fp8"][w]["gate_addmm_ms"] / run["fp8"][w]["gate_fp8_ms"] for w in widths]
    rows.append(["both steps, bfloat16 over FP8", *(f"{g:.2f}x" for g in together)])
    for key, text in (
        ("relative_error", "with the residual"),
        ("relative_error_of_product", "of the product alone"),
    ):
        rows.append(
            [f"relative error to float64, {text}", *(f"{run['fp8'][w][key]:.4f}" for w in widths)]
        )
    return table(["65,536 rows, ms", *(f"d={w}" for w in widths)], rows)


def rows_table(run: dict) -> str:
    rows = [
        [name, f"{r['ms']:.4f}", f"{r['mb']:.0f}", f"{r['tb_s']:.2f}", f"{r['of_copy']:.0%}"]
        for name, r in run["rows"].items()
    ]
    return table(["row kernel", "ms", "MB moved", "TB/s", "of a copy of as many bytes"], rows)


def step_table(step: dict) -> str:
    rows = [[f"`{k['name']}`", f"{k['ms']:.3f}", f"{k['calls']:.0f}"] for k in step["kernels"]]
    return table(["kernel", "ms a step", "launches"], rows)


def section(run: dict) -> str:
    machine, step, layer, ceilings = (
        run["machine"],
        run["training_step"],
        run["layer"],
        run["ceilings"],
    )
    versions = f"one {machine['device']}, torch {machine['torch']}, triton {machine['triton']}"
    parity = parity_told(run["parity"])
    rates = (
        f"copy {ceilings['copy_tb_s']:.2f} TB/s, bfloat16 GEMM {ceilings['gemm_tflops']:.0f} "
        "TFLOP/s"
    )
    on, off = layer["bf16, all recompute 16384"], layer["bf16, nothing recomputed 16384"]
    kept, longer = (
        on["kept_mb"] / off["kept_mb"],
        on["forward_backward_ms"] / off["forward_backward_ms"] - 1,
    )
    products = table(
        ["product", "ms"],
        [[name, f"{numbers['ms']:.3f}"] for name, numbers in run["products"].items()],
    )
    five = ", ".join(f"{name} {of['ms']:.2f} ms" for name, of in run["five_layers"].items())
    timed = {part: run[part] for part in ("layer", "products", "fp8", "rows", "five_layers")}
    host = ", ".join(f"{name} {us:.0f}" for name, us in run["host_us"].items())
    clock = (
        f", {step['wall_ms']:.1f} by the clock, {step['launches']:.0f} launches"
        if "launches" in step
        else ""
    )
    groups = table(
        ["share of the step's device time", ""],
        [[n, f"{s:.1%}"] for n, s in step["groups"].items()],
    )
    return f"""## The layer

`python -m benchmarks.kernels.layer`, {versions}: d = 512, 4 heads of 128, 65,536 tokens, window \
256 and full rows 256,
bfloat16, medians of 30 runs with the L2 flushed, those of a column in turns, after {parity}. 10 \
and 90 % of the runs
lie at most {widest_interval(timed):.0%} from their median. Ceilings in the same run: {rates}. \
{ZIPF}: lengths are 16,384 / rank,
up to 256 candidates a user, each with a visible length of its own, 10 % of the gate dropped in \
training.

{layer_table(run)}

What is kept counts the layer's input. All recompute keeps {kept:.2f} of what nothing recomputed \
keeps (goal 1/3), and
takes {longer:.1%} longer (goal 8 %).

{products}

FP8 is row-wise e4m3; weights are quantised once, outside of the times:

{fp8_table(run)}

{rows_table(run)}

- 5 layers, 32 users, 1,024 history rows + 2,048 candidates each, inference: {five}
  (goals: 6.5 in bfloat16, 5.8 in FP8; a user of the authors' code published 9.30).
- Host, µs a layer: {host}.

One training step of the whole model, {step["tokens"]:,} tokens, {step["layers"]} layers of d = \
512, dropout, optimizer:
{step["device_ms"]:.1f} ms of device time{clock}.

{groups}

<details><summary>its largest kernels</summary>

{step_table(step)}

</details>"""


def write_report(run: dict) -> None:
    write_section("layer", section(run))

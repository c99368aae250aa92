"""Compiles the kernels of the STU layer beside attention, prints JSON; never interpreted."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.frozen_tokens import triton_kernels as frozen_kernels
from kernels.frozen_tokens import triton_launch as frozen
from kernels.layer_norm import triton_kernels as layer_norm
from kernels.layer_norm.triton_launch import BACKWARD as NORM_BACKWARD
from kernels.layer_norm.triton_launch import FORWARD, SWISH_BACKWARD
from kernels.linear import triton_kernels as linear
from kernels.linear.triton_launch import LinearTile, tile_size
from kernels.norm_gate import triton_kernels as norm_gate
from kernels.norm_gate.triton_launch import BACKWARD as GATE_BACKWARD
from kernels.norm_gate.triton_launch import FORWARD as GATE_FORWARD
from kernels.position_time import triton_kernels as position_time
from kernels.position_time import triton_launch as placing

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT32 = {
    "shifts",
    "partial",
    "scale",
    "x_scale",
    "w_scale",
    "sums",
    "position_table",
    "time_table",
}
INT64 = {"position", "gap_ms", "third", "ids", "order", "seed_at", "seq_offsets"}
FLOATS = {"eps", "gain"}


def build(
    kernel: Any, arch: int, constants: dict, given: dict[str, str], warps: int, stages: int
) -> dict[str, Any]:
    """Bytes of shared memory and stack, how often the PTX names an instruction, and how rows lie on
    threads where they are summed; unnamed arguments are by type."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in given:
            types[name] = given[name]
        elif name.startswith(("num_", "stride_")) or name in (
            "width",
            "silu_from",
            "threshold",
            "steps",
        ):
            types[name] = "i32"
        else:
            types[name] = "fp32" if name in FLOATS else "*fp32" if name in FLOAT32 else "*bf16"
        if name in INT64:
            types[name] = "*i64"
    aligned = [
        i
        for i, (k, t) in enumerate(types.items())
        if t.startswith("*") or k.startswith(("stride", "width"))
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    registers = re.search(r"REG:(\d+)", usage)
    assert stack is not None and registers is not None, usage
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg.blocked<(\{.*\})>", ttgir))
    row_sums = re.findall(
        r"\(tensor<\d+x\d+xf32, (#blocked\d*)>\) -> tensor<\d+xf32, #ttg.slice<\{dim = 1", ttgir
    )
    return {
        "row_sums": sorted({layouts[name] for name in row_sums}),
        "shared": compiled.metadata.shared,
        "stack": int(stack[1]),
        "registers": int(registers[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
    }


def build_linear(
    arch: int,
    tile: LinearTile,
    *,
    fp8: bool = False,
    silu: bool = False,
    slope: bool = False,
    scaled: bool = False,
) -> dict:
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.inputs,
        "PARTS": tile.parts,
    }
    constants |= {
        "SILU": silu,
        "SLOPE": slope,
        "RESIDUAL": not silu,
        "SCALED": fp8 or scaled,
        "FP8": fp8,
        "TMA": arch == 90,
        "FAST": True,
    }
    constants |= {"EVEN": True, "FLATTEN": tile.flatten, "TMA_OUT": tile.tma_out}
    kind = "fp8e4nv" if fp8 else "bf16"
    given = {"x": f"*{kind}", "w": f"*{kind}"}
    if arch == 90:
        given = {"x": f"tensordesc<{kind}[{tile.rows}, {tile.inputs}]>"}
        given["w"] = f"tensordesc<{kind}[{tile.outputs}, {tile.inputs}]>"
        if tile.tma_out:
            given |= dict.fromkeys(
                ("out", "slope"), f"tensordesc<bf16[{tile.rows}, {tile.outputs // tile.parts}]>"
            )
    return build(linear.linear, arch, constants, given, tile.warps, tile.stages)


def build_position_time(arch: int) -> dict[str, dict]:
    found = {"BLOCK": placing.FOUND, "THIRD": True}
    added = {"ROWS": placing.TILE // 512, "BLOCK": 512, "THIRD": True}
    sums, sums32 = (
        {"BLOCK_N": places, "BLOCK_E": columns} for places, columns in placing.SUMMED.values()
    )
    keys, keys32 = {"keys": "*i16"}, {"keys": "*i32", "grad": "*fp32"}
    builds = [
        ("find_keys, event", position_time.find_keys, {**found, "EVENT": True}, keys),
        ("find_keys, query", position_time.find_keys, {**found, "EVENT": False}, keys),
        ("add_rows", position_time.add_rows, added, keys),
        ("name_rows", position_time.name_rows, {"BLOCK_R": placing.NAMED, "BLOCK_E": 128}, keys),
        ("sum_runs", position_time.sum_runs, sums, keys),
        ("sum_runs, float32", position_time.sum_runs, sums32, keys32),
        ("finish_runs", position_time.finish_runs, {**sums, "BLOCK_C": placing.PARTIAL}, keys),
    ]
    return {
        f"sm_{arch} position and time {name}": build(kernel, arch, constants, given, 4, 1)
        for name, kernel, constants, given in builds
    }


def build_frozen_tokens(arch: int) -> dict[str, dict]:
    """Kernels of tokens without gradients; the weights of norms are float32, as a model's are."""
    tile, inputs = frozen.SWISH, 128
    swish = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": inputs}
    swish |= {"TMA": arch == 90, "FAST": True, "EVEN": True}
    of_swish = dict.fromkeys(("bias", "norm_weight", "norm_bias"), "*fp32")
    if arch == 90:
        boxes = {"x": (tile.rows, inputs)}
        boxes |= dict.fromkeys(("w", "factors"), (tile.outputs, inputs))
        boxes["out"] = tile.rows, tile.outputs
        of_swish |= {name: f"tensordesc<bf16[{m}, {n}]>" for name, (m, n) in boxes.items()}

    find = {"BLOCK": frozen.FOUND, "EVENT": True, "ACTIONS": 8, "MERGED": False}
    of_find = dict.fromkeys(("action_mask", "known_mask", "num_targets", "found"), "*i32")
    rows, block, warps = frozen.PLACED.of(512)
    of_place = {"found": "*i32", "weight": "*fp32", "bias": "*fp32"}
    column, of_column = {"ROWS": 32, "BLOCK": 64}, {"codes": "*i32", "table": "*fp32"}
    place = {"ROWS": rows, "BLOCK": block}
    kernels = frozen_kernels
    builds = [
        ("linear_swish", kernels.linear_swish, swish, of_swish, tile.warps, tile.stages),
        ("find_token_rows", kernels.find_token_rows, find, of_find, 4, 1),
        ("place_tokens 512", kernels.place_tokens, place, of_place, warps, 1),
        ("look_up_column", kernels.look_up_column, column, of_column, 4, 1),
    ]
    found = {}
    for name, kernel, constants, given, warps, stages in builds:
        found[f"sm_{arch} frozen {name}"] = build(kernel, arch, constants, given, warps, stages)
    return found


def main() -> None:
    found = {}
    for hopper, fp8, silu, slope in (
        (True, False, True, False),
        (True, False, True, True),
        (True, False, False, False),
        (True, True, True, False),
        (True, True, False, False),
        (False, False, True, True),
    ):
        tile = tile_size(outputs=512, fp8=fp8, residual=not silu, half=True, hopper=hopper)
        kind = f"{'fp8 ' * fp8}{'silu' if silu else 'residual'}{' slope' * slope}"
        arch = 90 if hopper else 80
        found[f"sm_{arch} linear {kind}"] = build_linear(
            arch, tile, fp8=fp8, silu=silu, slope=slope
        )
    tile = tile_size(outputs=2048, fp8=False, residual=False, half=True, hopper=True)
    found["sm_90 linear silu folded"] = build_linear(90, tile, silu=True, scaled=True)
    codes, mixed = {"out_fp8": "*fp8e4nv"}, {"weight": "*fp32", "bias": "*fp32"}  # as in training
    gate = {"CONCAT": False, "DROPOUT": True, "OUT": True}
    rowwise = [
        ("layer_norm forward", layer_norm.norm_forward, FORWARD, {"OUT": True, "FP8": False}, {}),
        (
            "layer_norm forward codes",
            layer_norm.norm_forward,
            FORWARD,
            {"OUT": False, "FP8": True},
            codes,
        ),
        (
            "layer_norm forward both",
            layer_norm.norm_forward,
            FORWARD,
            {"OUT": True, "FP8": True},
            codes,
        ),
        ("layer_norm quantize", layer_norm.quantize, FORWARD, {}, codes),
        ("layer_norm row scales", layer_norm.row_scales, FORWARD, {}, {}),
        ("layer_norm backward", layer_norm.norm_backward, NORM_BACKWARD, {"RESIDUAL": True}, mixed),
        ("layer_norm swish forward", layer_norm.swish_forward, FORWARD, {}, {}),
        ("layer_norm swish backward", layer_norm.swish_backward, SWISH_BACKWARD, {}, mixed),
        (
            "norm_gate forward codes",
            norm_gate.gate_forward,
            GATE_FORWARD,
            {**gate, "OUT": False, "FP8": True},
            codes,
        ),
        (
            "norm_gate forward both",
            norm_gate.gate_forward,
            GATE_FORWARD,
            {**gate, "FP8": True},
            codes,
        ),
        ("norm_gate backward", norm_gate.gate_backward, GATE_BACKWARD, gate, {}),
        (
            "norm_gate forward, float32 weights",
            norm_gate.gate_forward,
            GATE_FORWARD,
            {**gate, "FP8": False},
            mixed,
        ),
        (
            "norm_gate backward, float32 weights",
            norm_gate.gate_backward,
            GATE_BACKWARD,
            gate,
            mixed,
        ),
    ]
    for name, kernel, rows, constants, given in rowwise:
        for width in (512, 1024) if "swish" in name else (512,):
            count, block, warps = rows.of(width)
            constants |= {"ROWS": count, "BLOCK": block}
            if "STAGES" in kernel.arg_names:
                constants["STAGES"] = rows.stages
            found[f"sm_90 {name} {width}"] = build(kernel, 90, constants, given, warps, 1)
    found |= build_position_time(90) | build_position_time(80)
    found |= build_frozen_tokens(90) | build_frozen_tokens(80)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

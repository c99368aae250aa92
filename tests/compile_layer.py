"""Compiles the kernels of the STU layer beside attention, prints JSON; not under TRITON_INTERPRET."""

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

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.layer_norm import triton_kernels as layer_norm
from kernels.layer_norm.triton_launch import row_block
from kernels.linear import triton_kernels as linear
from kernels.linear.triton_launch import Tile, tile_size
from kernels.norm_gate import triton_kernels as norm_gate

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT32 = {"partial", "scale", "x_scale", "w_scale"}
FLOATS = {"eps", "gain"}


def build(kernel: Any, arch: int, constants: dict, given: dict[str, str], warps: int, stages: int) -> dict[str, int]:
    """Bytes of shared memory and stack, and how often the PTX names an instruction; unnamed arguments are by type."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in given:
            types[name] = given[name]
        elif name.startswith(("num_", "stride_")) or name in ("width", "silu_from", "seed", "threshold"):
            types[name] = "i32"
        else:
            types[name] = "fp32" if name in FLOATS else "*fp32" if name in FLOAT32 else "*bf16"
    aligned = [i for i, (k, t) in enumerate(types.items()) if t.startswith("*") or k.startswith(("stride", "width"))]
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
    ptx = compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        "stack": int(stack[1]),
        "registers": int(registers[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
    }


def build_linear(arch: int, tile: Tile, *, fp8: bool = False, silu: bool = False, pre: bool = False):
    constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": tile.inputs, "PARTS": tile.parts}
    constants |= {"SILU": silu, "PRE": pre, "RESIDUAL": not silu, "FP8": fp8, "TMA": arch == 90, "FAST": True}
    constants |= {"EVEN": True, "FLATTEN": tile.flatten}
    kind = "fp8e4nv" if fp8 else "bf16"
    given = {"x": f"*{kind}", "w": f"*{kind}"}
    if arch == 90:
        given = {"x": f"tensordesc<{kind}[{tile.rows}, {tile.inputs}]>"}
        given["w"] = f"tensordesc<{kind}[{tile.outputs}, {tile.inputs}]>"
    return build(linear.linear, arch, constants, given, tile.warps, tile.stages)


def main() -> None:
    found = {}
    bf16, fp8, ampere = (
        tile_size(fp8=f, half=True, hopper=h) for f, h in ((False, True), (True, True), (False, False))
    )
    found["sm_90 linear silu, both forms"] = build_linear(90, bf16, silu=True, pre=True)
    found["sm_90 linear residual"] = build_linear(90, bf16)
    found["sm_90 linear fp8 silu"] = build_linear(90, fp8, fp8=True, silu=True)
    found["sm_90 linear fp8 residual"] = build_linear(90, fp8, fp8=True)
    found["sm_80 linear silu, both forms"] = build_linear(80, ampere, silu=True, pre=True)
    rows, block = row_block(512, 2048)
    size = {"ROWS": rows, "BLOCK": block}
    codes = {"out_fp8": "*fp8e4nv"}
    gate = {"CONCAT": False, "DROPOUT": True, "OUT": True}
    rowwise = [
        ("layer_norm forward", layer_norm.forward, {**size, "OUT": True, "FP8": True}, codes),
        ("layer_norm quantize", layer_norm.quantize, size, codes),
        ("layer_norm backward", layer_norm.backward, {**size, "RESIDUAL": True}, {}),
        ("norm_gate forward", norm_gate.forward, {**size, **gate, "FP8": True}, codes),
        ("norm_gate backward", norm_gate.backward, {**size, **gate, "ROWS": row_block(512, 1024)[0]}, {}),
    ]
    for name, kernel, constants, given in rowwise:
        found[f"sm_90 {name}"] = build(kernel, 90, constants, given, 4, 1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

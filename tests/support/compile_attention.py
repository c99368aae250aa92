"""Compiles the semi-local attention kernels with the static table's tiles, prints JSON; not under
TRITON_INTERPRET.
"""

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

from kernels.semi_local_attention import triton_kernels
from kernels.semi_local_attention.tile_table import AttentionTile, tile_sizes

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = "forward", "backward_queries", "backward_keys"
POINTERS = {
    "*bf16": {"out", "dq", "dk", "dv", "slope_q", "slope_k", "slope_v"},
    "*fp32": {"sums", "partial", "partial_k", "partial_v", "positions", "per_unit"},
    "*i32": {
        "arrived",
        "tiles",
        "header",
        "visible",
        "oldest",
        "cells",
        "event_time",
        "query_time",
    },
    "*i64": {"d_position", "d_time"},
}


def signature(
    name: str, constants: dict, tile: AttentionTile, width: int, descriptors: bool
) -> dict[str, str]:
    found = {}
    for argument in getattr(triton_kernels, name).arg_names:
        rows = tile.rows if argument in ("q", "grad") else tile.keys
        if argument in constants:
            found[argument] = "constexpr"
        elif argument in ("q", "k", "v", "grad", "own_k", "own_v"):
            found[argument] = f"tensordesc<bf16[{rows}, {width}]>" if descriptors else "*bf16"
        elif argument in ("alpha", "scale"):
            found[argument] = "fp32"
        else:
            found[argument] = next(
                (kind for kind, names in POINTERS.items() if argument in names), "i32"
            )
    return found


def build(name: str, arch: int, width: int, tile: AttentionTile, **flags: bool) -> dict[str, Any]:
    kernel = getattr(triton_kernels, name)
    how = {
        "TMA": arch == 90,
        "FAST": True,
        "PRECISION": "ieee",
        "ON_GPU": True,
        "HELD": tile.held,
    }
    shape = {"HEADS": 4, "D": width, "V": width, "OUT_D": width, "OUT_V": width}
    shape |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    switches = {
        "HAS_PREFIX": False,
        "CANDIDATES": False,
        "VISIBLE": False,
        "FROM": False,
        "BIAS": False,
        "SLOPE": True,
        "SUMS": True,
    }
    constants = {**switches, **flags, **how, **shape}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = signature(name, constants, tile, width, arch == 90)
    aligned = [
        i for i, (k, t) in enumerate(types.items()) if t.startswith("*") or k.startswith("stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    stack, registers = (re.search(rf"{what}:(\d+)", usage.stdout) for what in ("STACK", "REG"))
    assert stack is not None and registers is not None, usage.stdout
    ptx, layouts = compiled.asm["ptx"], re.findall("swizzlingByteWidth = ..", compiled.asm["ttgir"])
    return {
        "waits": len(re.findall("HGMMA.*gsb0", usage.stdout)),
        "layouts": len(set(layouts)),
        "shared": compiled.metadata.shared,
        "stack": int(stack[1]),
        "registers": int(registers[1]),
        "held_products": len(re.findall(r"HGMMA\.\S+ R\d+, R\d+, gdesc", usage.stdout)),
        "products": usage.stdout.count("HGMMA"),
        "held": tile.held,
        "most_registers": tile.max_registers,
        "warps": tile.warps,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
    }


def main() -> None:
    found = {}
    everything = {"HAS_PREFIX": True, "CANDIDATES": True, "VISIBLE": True, "FROM": True}
    options = {"half": True, "biased": False}
    for name in KERNELS:
        banded = tile_sizes(name, 128, banded=True, max_seq_len=4096, hopper=True, **options)
        causal = tile_sizes(name, 128, banded=False, max_seq_len=4096, hopper=True, **options)
        narrow = tile_sizes(name, 32, banded=True, max_seq_len=4096, hopper=True, **options)
        ampere = tile_sizes(name, 128, banded=True, max_seq_len=4096, hopper=False, **options)
        found[f"sm_90 {name} 128 semi-local"] = build(name, 90, 128, banded, **everything)
        if causal != banded:
            found[f"sm_90 {name} 128 causal"] = build(name, 90, 128, causal)
        if name != "forward":
            found[f"sm_90 {name} 32"] = build(name, 90, 32, narrow, **everything)
        found[f"sm_80 {name} 128"] = build(name, 80, 128, ampere, **everything)
    for name in (*KERNELS, "backward_bias"):
        biased = tile_sizes(
            name, 128, banded=False, max_seq_len=1024, hopper=True, half=True, biased=True
        )
        found[f"sm_90 {name} 128 bias"] = build(
            name, 90, 128, biased, BIAS=True, SLOPE=False, SUMS=False, **everything
        )
    cached = tile_sizes("forward", 128, banded=False, max_seq_len=4096, hopper=True, **options)
    found["sm_90 forward_cached 128"] = build("forward_cached", 90, 128, cached)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

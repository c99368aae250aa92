"""Compiles the kernels of tables, losses and jagged rows for Hopper, prints JSON; not under
TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.full_softmax import triton_kernels as full
from kernels.full_softmax.triton_launch import BACKWARD, FORWARD, Blocks
from kernels.int4_embedding import triton_kernels as int4
from kernels.jagged import triton_kernels as jagged
from kernels.pages import triton_kernels as pages
from kernels.rowwise_adamw import triton_kernels as adamw
from kernels.sampled_softmax import half_kernels as half
from kernels.sampled_softmax import triton_kernels as softmax

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "*i64": {
        "left_offsets",
        "right_offsets",
        "offsets",
        "new_offsets",
        "order",
        "positives",
        "starts",
        "further_key",
        "further_part",
        *("block", "pages", "begins", "target", "places"),
        *("addresses", "num_words"),
    },
    "*i16": {"keys"},
    "*i32": {"packed", "ids", "negatives", "first_odd"},
    "*fp16": {"unit", "unit_users", "unit_items", "half", "half_users", "half_items"},
    "*bf16": {"whole", "left", "right", "long", "short", "out"},
    "*fp32": {
        *(
            "grads",
            "partial",
            "weight",
            "m",
            "v",
            "grad_scale",
            "users",
            "items",
            "loss",
            "lse",
            "grad",
        ),
        *("per_user_norm", "shifted_lse", "of_positive", "log_rates"),
        *("rows", "factor", "parts", "facts", "mean"),
        *("scale", "user_scale", "item_scale", "factor_scale"),
        *("norms", "user_norms", "item_norms", "of_position"),
    },
    "fp32": {
        "lr",
        "share1",
        "share2",
        "correct1",
        "correct2",
        "eps",
        "weight_decay",
        "per_temperature",
    },
}
BUILDS = [
    (jagged.concatenate_or_split, {"SPLIT": False, "BLOCK_T": 8, "BLOCK_E": 512}),
    (jagged.concatenate_or_split, {"SPLIT": True, "BLOCK_T": 8, "BLOCK_E": 512}),
    (jagged.truncate_tail, {"BACKWARD": False, "BLOCK_T": 8, "BLOCK_E": 512}),
    (jagged.truncate_tail, {"BACKWARD": True, "BLOCK_T": 8, "BLOCK_E": 512}),
    (int4.look_up, {"BLOCK_N": 16, "CODE_WORDS": 16}),
    (pages.copy_pieces, {"BLOCK_P": 4, "BLOCK_W": 512}),
    (pages.fill_pages, {"BLOCK_P": 4, "BLOCK_W": 512}),
    (adamw.update_rows, {"MOMENTUM": True, "BLOCK_N": 16, "BLOCK_D": 128}),
    (adamw.finish_rows, {"MOMENTUM": True, "BLOCK_N": 16, "BLOCK_C": 64, "BLOCK_D": 128}),
    (adamw.finish_rows, {"MOMENTUM": True, "BLOCK_N": 64, "BLOCK_C": 128, "BLOCK_D": 16}),
    (adamw.finish_rows, {"MOMENTUM": True, "BLOCK_N": 32, "BLOCK_C": 128, "BLOCK_D": 64}),
    (softmax.forward, {"RATES": False, "BLOCK_R": 64, "BLOCK_D": 64}),
    (softmax.forward, {"RATES": True, "BLOCK_R": 64, "BLOCK_D": 64}),
    (softmax.item_gradients, {"RATES": False, "SPLIT": False, "BLOCK_R": 64, "BLOCK_D": 64}),
    (softmax.item_gradients, {"RATES": True, "SPLIT": True, "BLOCK_R": 64, "BLOCK_D": 64}),
    (half.unit_rows, {"BROKEN_TO_ZERO": True, "BLOCK_R": 64, "BLOCK_D": 64}),
    (half.pair_keys, {"PAIRED": True, "LOWEST": -(2**15), "BLOCK_R": 512}),
    (full.largest_part, {"BLOCK": 1024}),
    (full.half_rows, {"PARTS": 512, "BLOCK_R": 64, "BLOCK_D": 64}),
]
# programs of one warp: kernel, its constants, and stages of its loads
ONE_WARP = [
    (half.forward, {"RATES": True, "BLOCK_R": 64, "BLOCK_D": 64}, 3),
    (
        half.item_gradients,
        {
            "COLUMNS": 513,
            "RATES": False,
            "PAIRED": True,
            "LONGEST": 4096,
            "BLOCK_R": 64,
            "BLOCK_D": 64,
        },
        2,
    ),
]
# the products of the softmax over all items, as they are launched at a width of 64
PRODUCTS = [
    (full.log_partition, {"MEAN": True}, FORWARD[64]),
    (full.item_gradients, {}, BACKWARD[64]),
]


def build_products(kernel, flags: dict, blocks: Blocks) -> dict[str, int]:
    sizes = {"BLOCK_P": blocks.rows, "BLOCK_N": blocks.others, "BLOCK_D": 64}
    return build(kernel, flags | sizes, {}, blocks.num_warps, blocks.num_stages)


def build(
    kernel, constants: dict, special: dict[str, str], num_warps: int = 4, num_stages: int = 3
) -> dict[str, int]:
    types = {}
    for argument in kernel.arg_names:
        named = next((kind for kind, names in POINTERS.items() if argument in names), "i32")
        types[argument] = "constexpr" if argument in constants else special.get(argument, named)
    widths = "width", "dim", "words"
    aligned = [i for i, (k, t) in enumerate(types.items()) if t.startswith("*") or k in widths]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, registers = (re.search(rf"{name}:(\d+)", usage) for name in ("STACK", "REG"))
    assert stack is not None and registers is not None, usage
    ptx = compiled.asm["ptx"]
    return {
        "stack": int(stack[1]),
        "registers": int(registers[1]),
        "shared": compiled.metadata.shared,
        "warps": num_warps,
        "copies_ahead": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "tensor_cores": len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "written_after_all_read": written_after_all_read(ptx),
    }


def written_after_all_read(ptx: str) -> bool:
    """Whether a barrier lies between the last load from global memory and the first store to it."""
    first_store, last_load = ptx.find("st.global"), ptx.rfind("ld.global")
    return "bar.sync" in ptx[last_load:first_store]


def main() -> None:
    found = {}
    for kernel, constants in BUILDS:
        flags = " ".join(
            f"{k}={v}" for k, v in constants.items() if isinstance(v, bool) or k == "BLOCK_D"
        )
        found[f"{kernel.__name__} {flags}".strip()] = build(kernel, constants, {})
    for kernel, constants, num_stages in ONE_WARP:
        found[f"half {kernel.__name__}"] = build(kernel, constants, {}, 1, num_stages)
    for kernel, flags, blocks in PRODUCTS:
        found[f"product {kernel.__name__}"] = build_products(kernel, flags, blocks)
    kernel, constants = BUILDS[5]
    found[f"{kernel.__name__} bfloat16"] = build(kernel, constants, {"weight": "*bf16"})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

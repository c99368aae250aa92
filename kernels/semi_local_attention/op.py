"""Semi-local SiLU attention, the op: checks, the choice of backend, and one mask plan per batch.

    q, k, v [T, H, ·] + seq_offsets + mask → `semi_local_attention` → [T, H, V]

Every layer of a batch has the same mask, so what a backend derives from it (a list of tiles) is
kept with the `seq_offsets` tensor it came from and serves all layers, forward and backward.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor

from kernels.backend import Backend, require_triton
from kernels.backend import require as _require
from kernels.semi_local_attention.reference import (
    cached_attention_reference,
    semi_local_attention_reference,
)
from kernels.semi_local_attention.torch_blocked import (
    TilePlan,
    cached_attention_blocked,
    plan_tiles,
    semi_local_attention_blocked,
)
from kernels.semi_local_attention.types import QueryRows, RelativeBias

Plan = TypeVar("Plan")
# num_targets, target_visible, target_from, extra_full_rows: what the mask knows of each sequence
MaskTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
TRITON_TYPES = torch.float16, torch.bfloat16, torch.float32
# id of seq_offsets → it, mask → (versions, tensors it was made of, plan)
_plans: dict[int, tuple[ref, dict]] = {}


def _require_triton(x: Tensor, width: int) -> None:
    require_triton(x)
    _require(
        x.dtype in TRITON_TYPES,
        f"the triton backend takes float16, bfloat16 and float32, got {x.dtype}",
    )
    _require(
        max(x.shape[2], width) <= 256,
        f"heads must be at most 256 wide, got {x.shape[2]} and {width}",
    )


def _check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    tensors: MaskTensors,
    mask: tuple[int | None, int, int],
    scaling_seq_len: int,
) -> None:
    """What can be told without reading values."""
    given = [x for x in (q, k, v, seq_offsets, *tensors) if x is not None]
    dtypes, devices = tuple([x.dtype for x in given]), tuple([x.device for x in given])
    sizes = tuple([None if x is None else x.shape for x in tensors])
    shapes = q.shape, k.shape, v.shape, seq_offsets.shape
    _check(*shapes, sizes, dtypes, devices, *mask, scaling_seq_len)


@lru_cache(1024)  # a model asks the same of every layer
def _check(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    offsets: torch.Size,
    sizes: tuple[torch.Size | None, ...],  # of MaskTensors
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    window: int | None,
    full_rows: int,
    prefix: int,
    scaling_seq_len: int,
) -> None:
    _require(len(q) == len(k) == len(v) == 3, f"q, k, v must be [T, H, ·], got {q}, {k}, {v}")
    _require(
        q == k and q[:2] == v[:2], f"q and k must be [T, H, D] and v [T, H, V], got {q}, {k}, {v}"
    )
    same = len(set(dtypes[:3])) == 1 and dtypes[0].is_floating_point
    _require(same, f"q, k, v must have one float type, got {dtypes[:3]}")
    fits = dtypes[3] == torch.int64 and len(offsets) == 1
    _require(fits, f"seq_offsets must be int64 [B + 1], got {dtypes[3]} {tuple(offsets)}")
    _check_mask_tensors(offsets[0] - 1, *sizes)
    _require(
        window is None or window >= 0,
        f"window must be a distance of 0 or more, or None, got {window}",
    )
    _require(full_rows >= 0, f"full_rows must be 0 or more, got {full_rows}")
    _require(prefix >= 0, f"prefix must be 0 or more, got {prefix}")
    _require(scaling_seq_len >= 1, f"scaling_seq_len must be 1 or more, got {scaling_seq_len}")
    _require(
        len(set(devices)) == 1,
        f"all tensors must be on one device, got {sorted(map(str, set(devices)))}",
    )


def _check_mask_tensors(
    batch: int,
    targets: torch.Size | None,
    visible: torch.Size | None,
    begin: torch.Size | None,
    extra: torch.Size | None,
) -> None:
    for name, size in (("num_targets", targets), ("extra_full_rows", extra)):
        if size is not None:
            fits = size == (batch,)
            _require(fits, f"{name} must be [{batch}], one per sequence, got {tuple(size)}")
    _require(targets is not None or visible is None, "target_visible needs num_targets")
    _require(begin is None or begin == visible, "target_from must be as long as target_visible")


def _check_lengths(
    num_tokens: int, seq_offsets: Tensor, max_seq_len: int, tensors: MaskTensors
) -> None:
    """What reads values; on a GPU this would wait for the device, so it is for CPUs."""
    num_targets, target_visible, _, extra_full_rows = tensors
    length = seq_offsets.diff()
    ends = int(seq_offsets[0]), int(seq_offsets[-1])
    _require(
        ends == (0, num_tokens),
        f"seq_offsets must go from 0 to T={num_tokens}, got {ends[0]} to {ends[1]}",
    )
    if len(length):
        shortest, longest = int(length.min()), int(length.max())
        _require(shortest >= 0, f"seq_offsets must not fall, got a sequence of length {shortest}")
        _require(
            longest <= max_seq_len,
            f"a sequence has {longest} tokens, above max_seq_len={max_seq_len}",
        )
    if num_targets is not None:
        _require(
            bool(((num_targets >= 0) & (num_targets <= length)).all()),
            "num_targets must be in 0..length",
        )
        total = int(num_targets.sum())
        given = total if target_visible is None else len(target_visible)
        _require(
            given == total, f"target_visible must be [{total}], one per candidate, got [{given}]"
        )
    if extra_full_rows is not None:
        _require(bool((extra_full_rows >= 0).all()), "extra_full_rows must be 0 or more")


def _shared_plan(
    seq_offsets: Tensor, mask: tuple, tensors: tuple[Tensor | None, ...], build: Callable[[], Plan]
) -> Plan:
    """The plan of these very tensors, built by `build()` unless an earlier layer did.

    It goes with `seq_offsets`, and so must not hold that tensor itself.
    """
    everything = seq_offsets, *tensors
    version = [
        None if t is None else (id(t), 0 if t.is_inference() else t._version) for t in everything
    ]
    owner = id(seq_offsets)
    entry = _plans.get(owner)
    if entry is None or entry[0]() is not seq_offsets:
        entry = _plans[owner] = ref(seq_offsets, lambda _: _plans.pop(owner, None)), {}
    plans = entry[1]
    found = plans.get(mask)
    if found is None or found[0] != version:
        # holds the tensors, so that their ids stay theirs
        found = plans[mask] = version, tensors, build()
    return found[2]


def triton_plan(
    num_tokens: int,
    seq_offsets: Tensor,
    max_seq_len: int,
    tensors: MaskTensors,
    window: int | None,
    full_rows: int,
    prefix: int,
    rows: QueryRows | None = None,
):
    """The `TritonPlan` of a batch and a mask, one for all layers; with `rows` only these ask."""
    mask = window, full_rows, prefix

    def build_plan():
        # where Triton is not installed, CPUs still work
        from kernels.semi_local_attention.plan import TritonPlan

        num_targets, target_visible, target_from, extra_full_rows = tensors
        return TritonPlan(
            seq_offsets.detach(),
            num_targets,
            target_visible,
            num_tokens,
            max_seq_len,
            *mask,
            target_from=target_from,
            extra_full_rows=extra_full_rows,
            asked_before=None if rows is None else count_before(rows.index, num_tokens),
        )

    if rows is None:
        return _shared_plan(seq_offsets, ("triton", *mask), tensors, build_plan)
    made_of = *tensors, rows.index
    return _shared_plan(seq_offsets, ("triton rows", *mask), made_of, build_plan)


def count_before(index: Tensor, num_tokens: int) -> Tensor:
    """int32 [T + 1]: how many of `index`, ascending, lie before each token.

    index 1 3 of 4 tokens    0 0 1 1 2
    """
    is_asked = torch.zeros(num_tokens + 1, dtype=torch.int32, device=index.device)
    return is_asked.index_fill_(0, index + 1, 1).cumsum(0, dtype=torch.int32)


def _cached_plan(
    num_rows: int,
    row_offsets: Tensor,
    num_keys: int,
    cache_offsets: Tensor,
    visible: Tensor | None,
):
    """The `TritonPlan` of new rows over cached keys."""

    def build_plan():
        from kernels.semi_local_attention.plan import TritonPlan

        offsets = cache_offsets.detach(), row_offsets.detach()
        return TritonPlan(*offsets, visible, num_rows, num_keys, None, 0, 0, cached=True)

    return _shared_plan(row_offsets, ("cached",), (cache_offsets, visible), build_plan)


def semi_local_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    seq_offsets: Tensor,
    *,
    max_seq_len: int,
    num_targets: Tensor | None = None,
    target_visible: Tensor | None = None,
    target_from: Tensor | None = None,
    extra_full_rows: Tensor | None = None,
    window: int | None = None,
    full_rows: int = 0,
    prefix: int = 0,
    bias: RelativeBias | None = None,
    query_rows: QueryRows | None = None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """SiLU(attn_alpha · q·k + bias) v / scaling_seq_len, summed over the keys that
    `semi_local_mask` keeps, [T, H, V].

    `seq_offsets` int64 [B + 1]; `num_targets` int [B]: the last tokens of each sequence that are
    candidates; `target_visible` int32 [num_targets.sum()]: a candidate sees the positions below it
    (context counted) and itself; `target_from`, as long: of these only the prefix and the positions
    from it on; `extra_full_rows` int [B]: so many rows of each sequence more than `full_rows` are
    full; `window` None is plain causal. `out_dtype` is q's by default;
    float32 keeps the sums of half-precision inputs whole. With `query_rows` only those tokens ask,
    q and the result are [R, H, ·], and the backend is the blocked PyTorch form. `"auto"` is Triton
    for CUDA tensors and the blocked PyTorch form on the CPU.

    Raises:
        ValueError: on shapes, types and mask numbers that do not fit; on lengths too where tensors
        are on the CPU.
    """
    mask = window, full_rows, prefix
    tensors = num_targets, target_visible, target_from, extra_full_rows
    asking = q_THD if query_rows is None else _check_rows(q_THD, k_THD, query_rows, backend)
    _check_inputs(asking, k_THD, v_THV, seq_offsets, tensors, mask, scaling_seq_len)
    if not q_THD.is_cuda:
        _check_lengths(len(k_THD), seq_offsets, max_seq_len, tensors)

    qkv = q_THD, k_THD, v_THV
    rest = {"bias": bias, "attn_alpha": attn_alpha, "scaling_seq_len": scaling_seq_len}
    if backend == "reference":
        named = {"num_targets": num_targets, "target_visible": target_visible}
        named |= {"target_from": target_from, "extra_full_rows": extra_full_rows}
        named |= {"window": window, "full_rows": full_rows, "prefix": prefix}
        out = semi_local_attention_reference(*qkv, seq_offsets, **named, **rest)
        return out.to(out_dtype or q_THD.dtype)

    if backend == "triton" or (backend == "auto" and q_THD.is_cuda):
        _require_triton(q_THD, v_THV.shape[2])
        from kernels.semi_local_attention.triton_autograd import semi_local_attention_triton

        plan = triton_plan(len(q_THD), seq_offsets, max_seq_len, tensors, *mask)
        return semi_local_attention_triton(*qkv, plan, out_dtype=out_dtype, **rest)

    known = backend in ("auto", "torch")
    _require(known, f"backend must be auto, triton, torch or reference, got {backend!r}")
    plan = _tile_plan(seq_offsets, tensors, mask, query_rows)
    return semi_local_attention_blocked(*qkv, plan, out_dtype=out_dtype, **rest)


def _check_rows(q_RHD: Tensor, k_THD: Tensor, rows: QueryRows, backend: Backend) -> Tensor:
    """What stands for q where shapes of all tokens are checked."""
    expected = len(rows.index), *k_THD.shape[1:]
    _require(q_RHD.shape == expected, f"q must be {expected}, one per query row, got {q_RHD.shape}")
    known = backend in ("auto", "torch") and not q_RHD.is_cuda
    _require(known, f"query_rows are for the blocked form on a CPU, got backend {backend!r}")
    return k_THD


def _tile_plan(
    seq_offsets: Tensor,
    tensors: MaskTensors,
    mask: tuple[int | None, int, int],
    query_rows: QueryRows | None,
) -> TilePlan:
    """The blocked form's plan of a batch and a mask, one for all layers."""
    if query_rows is None:
        return _shared_plan(
            seq_offsets, ("torch", *mask), tensors, lambda: plan_tiles(seq_offsets, *tensors, *mask)
        )
    return _shared_plan(
        seq_offsets,
        ("torch rows", *mask),
        (*tensors, query_rows.index, query_rows.offsets),
        lambda: plan_tiles(seq_offsets, *tensors, *mask, query_rows),
    )


def _check_cached(
    q_CHD: Tensor,
    own_k_CHD: Tensor,
    own_v_CHV: Tensor,
    row_offsets: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    cache_offsets: Tensor,
) -> None:
    q, k, v = q_CHD.shape, k_THD.shape, v_THV.shape
    _require(
        len(q) == len(k) == len(v) == 3,
        f"q, k, v must be [C, H, D], [T, H, D], [T, H, V], got {q}, {k}, {v}",
    )
    _require(
        q[1:] == k[1:] and k[:2] == v[:2],
        f"q, k must be [·, H, D] and v [T, H, V], got {q}, {k}, {v}",
    )
    own = own_k_CHD.shape, own_v_CHV.shape
    _require(
        own == (q, (*q[:2], v[2])),
        f"own_k must be {q} and own_v {(*q[:2], v[2])}, got {own[0]} and {own[1]}",
    )
    dtypes = {x.dtype for x in (q_CHD, own_k_CHD, own_v_CHV, k_THD, v_THV)}
    _require(len(dtypes) == 1, f"q, k, v must have one type, got {sorted(map(str, dtypes))}")
    offsets = row_offsets.dtype, cache_offsets.dtype, row_offsets.shape, cache_offsets.shape
    same = offsets[:2] == (torch.int64, torch.int64) and offsets[2] == offsets[3]
    _require(same, f"row_offsets and cache_offsets must be int64 [B + 1], got {offsets}")


def cached_attention(
    q_CHD: Tensor,
    own_k_CHD: Tensor,
    own_v_CHV: Tensor,
    row_offsets: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    cache_offsets: Tensor,
    *,
    visible: Tensor | None = None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Serving: C new rows of B users over the keys and values cached for each user, [C, H, V];
    forward only.

    `row_offsets` and `cache_offsets` int64 [B + 1]. A row sees its user's cache, or the first
    `visible` int32 [C] keys of it, and itself: what `semi_local_attention` gives to candidates.
    `out_dtype` is q's by default.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    _check_cached(q_CHD, own_k_CHD, own_v_CHV, row_offsets, k_THD, v_THV, cache_offsets)
    of_rows = visible is None or visible.shape == q_CHD.shape[:1]
    _require(of_rows, f"visible must be [{len(q_CHD)}], one per row")
    options = {"attn_alpha": attn_alpha, "scaling_seq_len": scaling_seq_len}
    tensors = q_CHD, own_k_CHD, own_v_CHV
    cache = k_THD, v_THV, cache_offsets
    if backend == "triton" or (backend == "auto" and q_CHD.is_cuda):
        _require_triton(q_CHD, v_THV.shape[2])
        from kernels.semi_local_attention.triton_autograd import cached_attention_triton

        sizes = len(q_CHD), row_offsets, len(k_THD), cache_offsets
        plan = _cached_plan(*sizes, visible)
        return cached_attention_triton(*tensors, k_THD, v_THV, plan, out_dtype=out_dtype, **options)

    _require(
        backend in ("auto", "torch", "reference"),
        f"backend must be auto, triton, torch or reference: {backend!r}",
    )
    places = row_offsets, *cache
    if backend == "reference":
        out = cached_attention_reference(*tensors, *places, visible=visible, **options)
        return out.to(out_dtype or q_CHD.dtype)
    return cached_attention_blocked(
        *tensors, *places, visible=visible, out_dtype=out_dtype, **options
    )

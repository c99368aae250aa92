"""Launches of the token encoder's kernels without gradients. They record nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.frozen_tokens import MOST_INPUTS, triton_kernels
from kernels.launch import cdiv, launch, next_power_of_2
from kernels.layer_norm.triton_launch import Rows
from kernels.linear.triton_launch import by_descriptor, is_hopper, matrix_descriptor
from kernels.position_time.types import Anchor

TILE = 2048  # numbers that a program of a row kernel holds: 16 a thread
FACTORS = 64  # a multiple of those of `FrozenSwish`
FOUND = 256  # tokens whose rows a program finds


@dataclass(frozen=True, slots=True)
class SwishTile:
    """Tokens and outputs of a program's step, and how Triton runs it."""

    rows: int
    outputs: int
    warps: int
    stages: int


PLACED = Rows(2, 1)
SWISH = SwishTile(128, 64, 4, 3)


@dataclass(frozen=True, slots=True)
class TokenSequences:
    """How tokens fall into sequences, each behind its context in what is made."""

    seq_offsets: Tensor  # int64 [B + 1], without context
    num_targets: Tensor  # int32 [B]
    num_context: int

    @property
    def num_sequences(self) -> int:
        return self.num_targets.numel()


def launch_look_up(codes_T: Tensor, table_RE: Tensor, out_TE: Tensor) -> None:
    """Write the table's rows of the codes, in the output's type. Codes and output may be columns of
    wider matrices.
    """
    num_rows, width = out_TE.shape
    if not num_rows:
        return
    block = next_power_of_2(width)
    rows = max(TILE // block, 1)
    launch(
        triton_kernels.look_up_column, cdiv(num_rows, rows), (codes_T, table_RE, out_TE),
        (num_rows,), (width, codes_T.stride(0), out_TE.stride(0)), (rows, block),
        device=out_TE.device, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FrozenSwish:
    """A linear map h = x wᵀ + bias and a smaller one, of which the rows of h have their mean and
    variance.

    With W = [w, bias] less its mean over outputs, and Q R = W: |W [x, 1]| = |R [x, 1]|, a sum of at
    most K + 1 squares instead of N. The first of the P `factors` makes the mean, those behind it
    R [x, 1]; the rest are 0. They are kept as two halves, a rounded number and what rounding took
    from it, because R may be as good as singular.
    """

    weight: Tensor  # [N, K]
    bias: Tensor  # float32 [N]
    factors: Tensor  # [2 P, K]: rounded, and the rest
    shifts: Tensor  # float32 [P]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> "FrozenSwish":
        num_inputs, rounded = weight.shape[1], weight.to(dtype)
        whole = torch.cat([rounded.double(), bias.double()[:, None]], dim=1)
        mean = whole.mean(0, keepdim=True)
        r = torch.linalg.qr(whole - mean, mode="r").R

        num_factors = cdiv(num_inputs + 2, FACTORS) * FACTORS
        factors = whole.new_zeros(num_factors, num_inputs + 1)
        factors[0], factors[1 : 1 + len(r)] = mean[0], r
        shifts = factors[:, -1].float()
        high = factors[:, :-1].to(dtype)
        low = (factors[:, :-1] - high.double()).to(dtype)
        return cls(rounded, bias.float(), torch.cat([high, low]), shifts)


def launch_linear_swish(
    x_TK: Tensor,
    frozen: FrozenSwish,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    tile: SwishTile = SWISH,
) -> Tensor:
    """h * sigmoid(LayerNorm(h)) of h = x wᵀ + bias, [T, N] in x's type; K at most `MOST_INPUTS`."""
    num_rows, num_inputs = x_TK.shape
    w_NK, factors = frozen.weight, frozen.factors
    num_outputs, device = len(w_NK), x_TK.device
    assert num_inputs <= MOST_INPUTS and FACTORS % tile.outputs == 0
    out = torch.empty(num_rows, num_outputs, dtype=x_TK.dtype, device=device)
    if not num_rows:
        return out

    block = max(16, next_power_of_2(num_inputs))
    operands = x_TK, w_NK, factors, out
    tma = is_hopper(device) and all(map(by_descriptor, operands))
    x, w, narrow, made = operands
    if tma:
        x = matrix_descriptor(x_TK, tile.rows, block)
        w, narrow = (matrix_descriptor(t, tile.outputs, block) for t in (w_NK, factors))
        made = matrix_descriptor(out, tile.rows, tile.outputs)
    fast = x_TK.dtype.itemsize == 2 and device.type == "cuda"
    launch(
        triton_kernels.linear_swish, cdiv(num_rows, tile.rows),
        (x, w, narrow, frozen.shifts, frozen.bias, norm_weight, norm_bias, made), (num_rows,),
        (
            num_outputs, num_inputs, len(frozen.shifts), x_TK.stride(0), w_NK.stride(0), eps,
        ),
        (tile.rows, tile.outputs, block, tma, fast, num_outputs % tile.outputs == 0),
        device=device, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def find_token_rows(
    position_T: Tensor,
    gap_ms_T: Tensor,
    action_masks: tuple[Tensor, Tensor],
    sequences: TokenSequences,
    sizes: tuple[int, int],
    anchor: Anchor,
    *,
    num_actions: int,
    merged: bool,
) -> Tensor:
    """int32 [4, T]: each token's row of the position table, of the time table (`sizes` are their
    rows), of the actions' states, and of the output. `action_masks`: actions and those known, int32
    [T]; `merged`: all of them are one action.
    """
    num_rows, num_sequences = len(position_T), sequences.num_sequences
    found = torch.empty(4, num_rows, dtype=torch.int32, device=position_T.device)
    if num_rows:
        launch(
            triton_kernels.find_token_rows, cdiv(num_rows, FOUND),
            (
                position_T, gap_ms_T, *action_masks, sequences.seq_offsets, sequences.num_targets,
                found,
            ),
            (num_rows, num_sequences, num_sequences.bit_length()),
            (*sizes, sequences.num_context), (FOUND, anchor == "event", num_actions, merged),
            device=found.device, num_warps=4,
        )  # fmt: skip
    return found


def launch_place(
    x_TE: Tensor,
    norm: tuple[Tensor, Tensor, float],
    tables: tuple[Tensor, Tensor, Tensor],
    found: Tensor,
    num_out: int,
) -> Tensor:
    """[num_out, E]: LayerNorm(x) and its rows of the tables, added in float32 and rounded once,
    where `found` (`find_token_rows`) says; nothing is written to other rows.
    """
    num_rows, width = x_TE.shape
    out = torch.empty(num_out, width, dtype=x_TE.dtype, device=x_TE.device)
    if num_rows:
        weight, bias, eps = norm
        rows, block, warps = PLACED.of(width)
        launch(
            triton_kernels.place_tokens, cdiv(num_rows, rows),
            (x_TE, weight, bias, found, *tables, out), (num_rows,), (width, eps), (rows, block),
            device=x_TE.device, num_warps=warps,
        )  # fmt: skip
    return out

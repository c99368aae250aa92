"""LARES (arXiv:2505.16865): a few layers read the sequence once, others are gone through in a loop.

    H   = pre-layers(tokens)
    T_0 = noise in training, 0 otherwise
    T_i = core-layers(LN(join(T_{i−1}, H)))        i = 1 … k, the same weights each time

k is `model.loop.steps`; in training it is drawn anew for each batch, from 1 to twice as many. The
layers are those of one of two encoders, `model.loop.layer`. Their number is `model.num_layers` in
the core and `model.loop.pre_layers` before it.

The paper's first stage adds two alignments to the loss (pipeline/train/alignment.py), for which one
of the steps before the last is read as well (`Encoded.step_rows`). The second stage
(pipeline/train/reinforcement.py) reads all of them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.semi_local_attention.types import QueryRows
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.config.errors import require
from pipeline.model.encoders.encoder import (
    Encoded,
    Encoder,
    TokenLayout,
    last_layer_size,
    last_rows,
    next_rows,
    read_rows,
    spread_rows,
)
from pipeline.model.encoders.stu import STU, layer_flops
from pipeline.model.encoders.transformer import Padding, TransformerBlock, block_flops
from pipeline.model.flops import Flops, kept_pairs
from pipeline.model.tokens import Tokens

CUT = 3  # of the noise, in standard deviations

# a layer, its rows and those of them that are read, None for all → its rows
Run = Callable[[nn.Module, Tensor, QueryRows | None], Tensor]


class LARES(Encoder):
    """Pre-layers once, core layers in a loop, over plain causal attention."""

    has_history_rows = True

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        self.loop, d = cfg.loop, cfg.d_model
        self.every_step = layout.every_step
        self.pre = nn.ModuleList(self._layer(cfg) for _ in range(cfg.loop.pre_layers))
        self.core = nn.ModuleList(self._layer(cfg) for _ in range(cfg.num_layers))
        self.join = Join(cfg.loop.join, d)
        self.norm_step = nn.LayerNorm(d, eps=cfg.norm_eps)
        self.norm_out = nn.LayerNorm(d, eps=cfg.norm_eps)

    def _layer(self, cfg: ModelConfig) -> nn.Module:
        if cfg.loop.layer == "stu":
            return STU(cfg, self.num_context)
        return TransformerBlock(cfg)

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        run = self._runner(tokens)
        h_TE = tokens.x_TE
        for layer in self.pre:
            h_TE = run(layer, h_TE, None)

        # of the last layer of all, the rows that are read are enough
        num_steps, read_step = self._draw_steps()
        read = last_rows(tokens, self.num_context, last_history=last_history)

        state, between = self._first_state(h_TE), h_TE
        states: list[Tensor] = []
        for step in range(num_steps):
            state = self.norm_step(self.join(state, h_TE)).to(h_TE.dtype)
            for layer in self.core:
                is_last = step == num_steps - 1 and layer is self.core[-1]
                rows = read if is_last else None
                state = spread_rows(run(layer, state, rows), rows, len(h_TE))

            if step == read_step:
                between = state
            if self.every_step:
                states.append(state)

        final = replace(tokens, x_TE=state)
        encoded = read_rows(final, self.norm_out, self.num_context, last_history=last_history)
        if not self.training or encoded.next_rows is None:
            return encoded

        # what the two stages' losses read besides
        if self.every_step:
            after_each = tuple(self._rows_after(tokens, state) for state in states)
            return replace(encoded, every_step=after_each)
        return replace(encoded, step_rows=self._rows_after(tokens, between))

    def _rows_after(self, tokens: Tokens, state: Tensor) -> Tensor:
        """[P, width]: the rows before the next items in the state after a step."""
        rows = next_rows(replace(tokens, x_TE=state), self.norm_out, self.num_context)
        assert rows is not None
        return rows

    def _runner(self, tokens: Tokens) -> Run:
        if self.loop.layer == "stu":
            return lambda layer, x_TE, rows: layer(replace(tokens, x_TE=x_TE), rows=rows)
        padding = Padding.of(tokens, self.num_context)
        return lambda layer, x_TE, rows: layer(x_TE, padding, rows)

    def _draw_steps(self) -> tuple[int, int]:
        """How many steps are taken, and after which of them the state is read besides."""
        steps = self.loop.steps
        if not self.training:
            return steps, steps - 1
        if self.loop.random_steps:
            steps = int(torch.randint(1, 2 * steps + 1, ()))
        return steps, int(torch.randint(0, steps, ()))

    def _first_state(self, h_TE: Tensor) -> Tensor:
        """T_0: normal noise, cut, in training; evaluation and serving begin at 0."""
        if not self.training or self.loop.noise == 0:
            return torch.zeros_like(h_TE)
        return self.loop.noise * torch.randn_like(h_TE).clamp(-CUT, CUT)

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        super().check(cfg)
        rule = "false where model.encoder is lares"
        require(not cfg.fp8, "model.fp8", cfg.fp8, rule)

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        """Of `loop.steps` steps, also the mean of training's within one half."""
        num_tokens = len(tokens.x_TE)
        causal = kept_pairs(
            tokens.seq_offsets, tokens.num_targets, tokens.target_visible, None, 0, 0
        )
        num_layers = cfg.loop.pre_layers + cfg.loop.steps * cfg.num_layers
        pairs = num_layers * causal

        # whole layers, and the last one, which makes fewer rows
        of_layer = layer_flops if cfg.loop.layer == "stu" else block_flops
        num_rows, last_pairs = last_layer_size(tokens, layout)
        whole = (num_layers - 1) * of_layer(cfg, num_tokens, causal)
        last = of_layer(cfg, num_tokens, last_pairs, num_rows)

        # a linear join before each step: from T_{i-1} and H, 2 d numbers, to d
        joined = 2 if cfg.loop.join == "linear" else 0
        joins = cfg.loop.steps * 2 * num_tokens * joined * cfg.d_model * cfg.d_model

        flops = whole + last + joins
        return Flops(tokens=num_tokens, causal_pairs=pairs, kept_pairs=pairs, flops=flops)


class Join(nn.Module):
    """One row of the state T and the input H: a linear map of both, their mean, or a mean by one
    learned share.
    """

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        self.kind = kind
        self.both = nn.Linear(2 * d_model, d_model) if kind == "linear" else None
        self.share = nn.Parameter(torch.zeros(())) if kind == "gate" else None

    def forward(self, state: Tensor, h_TE: Tensor) -> Tensor:
        if self.both is not None:
            return self.both(torch.cat([state, h_TE], dim=1))
        if self.share is not None:
            return torch.lerp(h_TE, state, self.share.sigmoid().to(h_TE.dtype))
        return (state + h_TE) / 2

"""What ends a training that has gone wrong or learns no more: steps that are not finite,
divergence, early stop.

Nothing here makes the host wait for the device: whether a step is finite is known on the device,
where a bad one is left out, and the host looks when it reads the losses anyway, to log or to save.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ModelConfig, TrainConfig, UserError
from pipeline.train.checkpoint import TrainState

RECENT_LINES = 20  # lines of metrics behind the running median
FEWEST_LINES = 5  # before so many there is no median to speak of
HIGH_LINES = 3  # in a row above it: diverged
NAMED = 5  # offending tensors that an error names
QUIET_SHARE = 0.2  # of the size that Norm(A) has without its epsilon


def silent_attention(variances: Sequence[float], cfg: ModelConfig) -> str | None:
    """A warning where a layer's attention starts nearly silent; `variances` are those that Norm(A)
    divides by, a layer each.

    Norm(A) is as large as sqrt(Var(A) / (Var(A) + norm_eps)): with a variance of 1e-8 and an
    epsilon of 1e-6 a tenth of its size. Var(A) falls with the square of scaling_seq_len.
    """
    if not variances:
        return None
    least, eps = min(variances), cfg.norm_eps
    share = math.sqrt(least / (least + eps)) if least > 0 else 0.0
    if share >= QUIET_SHARE:
        return None

    sections = {"model.attention": cfg.attention}
    if cfg.channels:
        sections = {}
        for name, channel in cfg.channels.items():
            sections[f"model.channels.{name}.attention"] = channel.attention
    given = []
    for key, attention in sections.items():
        alpha = f"1 / d_qk = {1 / cfg.d_qk:g}"
        if attention.attn_alpha is not None:
            alpha = f"{attention.attn_alpha:g}"
        length = f"{key}.scaling_seq_len ({attention.scaling_seq_len})"

        # far below 0 SiLU is silent too, and a larger factor takes scores further
        cure = f"or raise its attn_alpha ({alpha})"
        if (attention.attn_alpha or 0) > 1:
            cure = f"or its attn_alpha ({alpha}), whose scores may lie far below 0"
        given.append(f"{length} {cure}")
    return (
        f"the attention of a layer starts at {share:.1%} of its size: Var(A) {least:.1e} is below "
        f"norm_eps {eps:.0e}, so it is learned late. Lower {'; '.join(given)}"
    )


class TrainingStopped(UserError):
    """Training cannot go on; every rank raises it at the same step."""


class FiniteGuard:
    """Counts the steps whose losses or gradients are not finite, on the device.

    Args:
        names: what `check` is given the finiteness of, in this order: tasks' losses, parameters'
        gradients.
        bad_steps: those that earlier attempts have counted.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str) -> None:
        self.names = list(names)
        # [left out since the last look, left out in a row, longest such row since the last look]
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        # in the last bad step
        self.wrong = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    def check(self, finite: Tensor) -> Tensor:
        """bool [], true to leave the step out; `finite` is bool [names], the same on all ranks."""
        bad = ~finite.all()
        missed, row, longest = self.counts
        row = (row + 1) * bad
        self.counts = torch.stack([missed + bad, row, torch.maximum(longest, row)])
        self.wrong = torch.where(bad, ~finite, self.wrong)
        return bad

    def take_bad_steps(self, step: int, most_in_a_row: int) -> int:
        """Steps left out since the last call; waits for the device.

        Raises:
            TrainingStopped: `most_in_a_row` of them or more came one after the other.
        """
        missed, row, longest = self.counts.tolist()
        self.counts = self.counts.new_tensor([0, row, row])
        if longest >= most_in_a_row:
            wrong = list(itertools.compress(self.names, self.wrong.tolist()))
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise TrainingStopped(
                f"{longest} steps in a row up to step {step} were left out, not finite in "
                f"{', '.join(wrong[:NAMED])}{more} (train.max_bad_steps {most_in_a_row}): lower "
                "train.lr or train.embedding_lr, or look at the data of these steps"
            )
        return missed


def watch_divergence(state: TrainState, loss: float, cfg: TrainConfig) -> None:
    """Take the mean loss of a line of metrics into `state`.

    Raises:
        TrainingStopped: it is the last of several in a row above `max_loss_ratio` times the running
        median.
    """
    if cfg.max_loss_ratio is None or not math.isfinite(loss):  # no step of this line counted
        return
    recent = state.recent_losses
    median = float(np.median(recent)) if len(recent) >= FEWEST_LINES else math.inf
    if loss <= cfg.max_loss_ratio * median:
        state.high_losses, state.recent_losses = 0, [*recent, loss][-RECENT_LINES:]
        return
    state.high_losses += 1
    if state.high_losses == HIGH_LINES:
        raise TrainingStopped(
            f"training diverged: at step {state.step} the loss is {loss:.4g}, for {HIGH_LINES} "
            f"lines of metrics in a row more than {cfg.max_loss_ratio:g} times its running median "
            f"of {median:.4g} (train.max_loss_ratio): lower train.lr or train.embedding_lr"
        )


def improved(state: TrainState, value: float, cfg: TrainConfig) -> bool:
    """Take a validation's `best_metric` into `state`; whether it is the best so far.

    NaN never is.
    """
    sign = -1 if cfg.best_metric == "ne" else 1
    if math.isnan(value) or (state.best is not None and sign * value <= sign * state.best):
        state.not_better += 1
        return False
    state.best, state.best_step, state.not_better = value, state.step, 0
    return True

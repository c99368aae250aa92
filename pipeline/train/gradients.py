"""Gradients of one rank in one flat buffer, which goes over the ranks in parts while backward runs.

    last layers …          … first layers
    part 0 │ part 1 │ …        │ last part

Backward comes to the last layers first: a part is sent as soon as its gradients are there.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.train.waiting import MessageClock

ALIGNED = 64  # numbers between the beginnings of weights in a flat buffer: 256 bytes in float32


class GradientBuffer:
    """The gradients of `parameters` as views of one buffer, `flat`.

    `places` says where each parameter lies.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.places: dict[str, slice] = {}
        size = 0
        for name, parameter in reversed(list(parameters.items())):
            self.places[name] = slice(size, size + parameter.numel())
            size += -(-parameter.numel() // ALIGNED) * ALIGNED

        like = next(iter(parameters.values()))
        self.size = size
        self.flat = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.parts = [(0, size)]
        self.in_parts = False
        self.sent: list[dist.Work | None] = []
        self.views: list[Tensor] = []
        for name, parameter in parameters.items():
            parameter.grad = self.flat[self.places[name]].view_as(parameter)
            self.views.append(parameter.grad)

    def clear(self) -> None:
        """Before `backward`.

        Where parts are sent meanwhile it adds to zeros in the buffer, a launch for each parameter.
        Elsewhere it leaves tensors of its own, which `collect` copies with a few launches.
        """
        if self.in_parts:
            self.flat.zero_()
            return
        for parameter in self.parameters.values():
            parameter.grad = None

    def collect(self) -> None:
        """After `backward`: all gradients are in the buffer, zero where a parameter got none."""
        if self.in_parts:
            return

        filled: list[Tensor] = []
        grads: list[Tensor] = []
        for parameter, view in zip(self.parameters.values(), self.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                filled.append(view)
                grads.append(parameter.grad)
            parameter.grad = view
        if filled:
            torch._foreach_copy_(filled, grads)  # pyright: ignore[reportPrivateImportUsage]

    def send_in_parts(self, part_bytes: float) -> None:
        """From now on every `backward` sends parts of at least `part_bytes`, once they are done."""
        self.in_parts = True
        self.parts = cut_parts(self.places, self.size, part_bytes / self.flat.itemsize)
        part_of: dict[str, int] = {}
        for name, place in self.places.items():
            for number, (begin, end) in enumerate(self.parts):
                if begin <= place.start < end:
                    part_of[name] = number

        self.missing = [0] * len(self.parts)
        self.full = [list(part_of.values()).count(number) for number in range(len(self.parts))]
        for name, number in part_of.items():
            count = partial(self._count_gradient, number)
            self.parameters[name].register_post_accumulate_grad_hook(count)

    def hold_parts(self) -> None:
        """Before a `backward` that sends nothing: one that is recorded."""
        self.missing = [len(self.parameters) + 1] * len(self.parts)

    def begin_step(self) -> None:
        """Before a `backward` whose parts are to be sent."""
        self.missing, self.sent = [*self.full], []

    def _count_gradient(self, number: int, _: Tensor) -> None:
        self.missing[number] -= 1
        # in order, as all ranks must send them
        while len(self.sent) < len(self.parts) and self.missing[len(self.sent)] == 0:
            self._send_next()

    def _send_next(self) -> None:
        begin, end = self.parts[len(self.sent)]
        self.sent.append(dist.all_reduce(self.flat[begin:end], async_op=True))

    def send_rest(self) -> None:
        """After `backward`: the parts of weights that got no gradient."""
        while len(self.sent) < len(self.parts):
            self._send_next()

    def finish(self, clock: MessageClock) -> None:
        """Wait until the buffer holds sums over the ranks."""
        for work in self.sent:
            clock.wait(work)


def cut_parts(places: Mapping[str, slice], size: int, least: float) -> list[tuple[int, int]]:
    """[begin, end) of the parts of a buffer: whole weights, `least` numbers or more, the last one
    what is left.

        weights begin at    0   64  192  256  320       size 384, least 128
        parts               [0      192) [192  320) [320 384)
    """
    starts = [place.start for place in places.values()]
    parts, begin = [], 0
    for start in starts[1:]:
        if start - begin >= least:
            parts.append((begin, start))
            begin = start
    return [*parts, (begin, size)]

"""Rows of the replicated tables that any rank looks up in a step: all know before backward ends.

    look-ups of the forward pass ─▶ a flag a row ─▶ the maximum over the ranks, during backward
        ─▶ the touched rows, numbered through ─▶ sums of gradients at the same places on each rank

So the gradients of these tables are a dense vector, which goes over the ranks in one message.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.model.tokens import TokenEncoder
from pipeline.train.optim import RowwiseAdamW
from pipeline.train.waiting import HostNumbers


class TouchedRows:
    """Rows of the stores of `rowwise` that hold whole tables, numbered through:

        stores         width 8: 14 rows    item: 32 rows
        flags          0 .. 13             14 .. 45
        touched        2, 5                15, 44
        their numbers  0 1                 2 3

    Args:
        tables: the replicated ones, by their path in the model.
    """

    def __init__(
        self, tables: Mapping[str, nn.Embedding], rowwise: RowwiseAdamW, numbers: HostNumbers
    ) -> None:
        self.numbers = numbers
        self.widths: dict[str, int] = {}
        self.first_flags: dict[str, int] = {}  # by store
        size = 0
        for path in tables:
            store, _ = rowwise.parts[path]
            if store not in self.widths:
                num_rows, self.widths[store] = rowwise.stores[store].shape
                self.first_flags[store] = size
                size += num_rows

        device = next(iter(tables.values())).weight.device
        bounds = [*self.first_flags.values(), size]
        self.bounds = torch.tensor(bounds, device=device)
        self.flags = torch.zeros(size, dtype=torch.uint8, device=device)
        self.number = torch.zeros(size, dtype=torch.int64, device=device)
        self.rows = torch.zeros(size, dtype=torch.int64, device=device)

        # by path, where the table begins among the flags
        self.firsts: dict[str, int] = {}
        self.looked_up: list[Tensor] = []
        # of each store: its touched rows, and how many lie in the stores before it
        self.counts: dict[str, int] = {}
        self.first_numbers: dict[str, int] = {}
        self.read: Callable[[], list] | None = None
        for path, table in tables.items():
            store, first_row = rowwise.parts[path]
            first = self.firsts[path] = self.first_flags[store] + first_row
            table.register_forward_pre_hook(partial(self._note_codes, first))

    def watch_places(
        self, encoder: TokenEncoder, position: str, time: str, rowwise: RowwiseAdamW
    ) -> None:
        """Note the rows of the encoder's tables of positions and times, which an operator looks up
        and not a module.
        """
        firsts = []
        for path in (position, time):
            store, first_row = rowwise.parts[path]
            firsts.append(self.first_flags[store] + first_row)

        def note_places(_: nn.Module, inputs: tuple[SequenceBatch]) -> None:
            for first, codes in zip(firsts, encoder.place_codes(*inputs), strict=True):
                self._note_codes(first, encoder, (codes,))

        encoder.register_forward_pre_hook(note_places)

    def _note_codes(self, first: int, _: nn.Module, inputs: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            self.looked_up.append(inputs[0].flatten() + first)

    def note_tables(self, codes: Mapping[str, Tensor]) -> None:
        """Note what a forward pass that nobody listens to looks up: per table, by its path, the
        codes of its rows.
        """
        self.looked_up = [rows.flatten() + self.firsts[path] for path, rows in codes.items()]

    def forget(self) -> None:
        """Before a step: what was looked up since the last one had no gradient."""
        self.looked_up.clear()

    def send(self) -> None:
        """Tell all ranks what the forward pass has looked up; `finish` waits for it."""
        with self.numbers.beside(self.looked_up):
            self.flags.zero_()
            self.flags.index_fill_(0, torch.cat(self.looked_up).long(), 1)
            work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, async_op=True)
            self.read = self.numbers.ask(work, self._number_rows)

    def _number_rows(self) -> Tensor:
        """The numbers of the touched rows, and how many lie below each store."""
        seen = self.flags.long()
        below = seen.cumsum(0)
        self.number = below - seen

        # the touched ones in order, without asking the device how many they are
        places = torch.arange(len(seen), device=seen.device)
        where = torch.where(seen > 0, self.number, len(seen))
        self.rows = torch.empty(len(seen) + 1, dtype=torch.int64, device=seen.device)
        self.rows.scatter_(0, where, places)
        return nn.functional.pad(below, (1, 0))[self.bounds]

    def finish(self) -> None:
        """Wait for the ranks; then `counts` are the touched rows of each store."""
        assert self.read is not None
        below = self.read()
        self.counts = {}
        self.first_numbers = dict(zip(self.widths, below[:-1], strict=True))
        for store, first, end in zip(self.widths, below[:-1], below[1:], strict=True):
            self.counts[store] = end - first
        self.read = None

    def sums(self, grads: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Per store the summed gradients [touched, d] of this rank, zeros in rows of others.

        `grads`: per store this rank's rows [n], with repeats, and their gradients [n, d].
        """
        found = []
        for store, count in self.counts.items():
            rows, values = grads[store]
            index = self.number[rows + self.first_flags[store]] - self.first_numbers[store]
            # The backward of a look-up: unlike a sum over segments it is as fast where one row has
            # most of the gradients.
            found.append(torch.ops.aten.embedding_dense_backward(values, index, count, -1, False))
        return found

    def split(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per store the touched rows and their gradients, from those of all stores side by side."""
        found, begin = {}, 0
        for store, width in self.widths.items():
            first, count = self.first_numbers[store], self.counts[store]
            rows = self.rows[first : first + count] - self.first_flags[store]
            values = flat[begin : begin + count * width].view(count, width)
            found[store] = rows, values
            begin += count * width
        return found

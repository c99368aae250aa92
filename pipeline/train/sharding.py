"""Embedding tables whose rows are split over the ranks in blocks.

    codes of the batch ─▶ distinct rows ─▶ their numbers, to the owners ─▶ the rows, back ─▶ looked
    up as in any table gradients of those rows, summed over the rank's batch ─▶ to the owners ─▶
    row-wise AdamW on their blocks

All tables go together: a step has four messages (counts, row numbers, rows, gradients), however
many there are, and
the host waits for the device once, for the counts. Rows arrive in the order of table and number,
gradients in the order of ranks: two runs agree bit for bit.
"""

import zlib
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.tokens import table
from pipeline.train.placement import Placement

LARGE = 2**28  # numbers: from here on a table is never whole on a host, and is drawn on its device
CHUNK_ROWS = 2**16  # of a large table, drawn from one seed
TABLE_BITS = 40  # of a key: the row; above them the table


class ShardedEmbedding(nn.Module):
    """This rank's block of rows, in the place of an `nn.Embedding`.

    It looks up what `ShardedTables.fetch` brought for the batch; `rows` collects the gradient,
    `weight` never has one."""

    def __init__(self, block: Tensor, num_embeddings: int, first_row: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = block.shape[1]
        self.first_row = first_row
        self.weight = nn.Parameter(block, requires_grad=False)
        self.rows: Tensor | None = None  # float32 [n, d]: the distinct rows of the batch
        self.index: Tensor | None = None  # int64 [T]: which of them stands where

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, first_row={self.first_row}, "
            f"rows={len(self.weight)}"
        )

    def forward(self, codes: Tensor) -> Tensor:
        assert self.rows is not None and self.index is not None and codes.shape == self.index.shape
        return F.embedding(self.index, self.rows)


class TableMaker:
    """Makes the tables of a model where its plan places them; `modules` holds them by name."""

    def __init__(
        self, plan: dict[str, Placement], rank: int, device: torch.device | str, seed: int
    ) -> None:
        self.plan, self.rank, self.device, self.seed = plan, rank, device, seed
        self.modules: dict[str, nn.Module] = {}
        self.sharded: dict[str, ShardedEmbedding] = {}

    def __call__(self, name: str, rows: int, dim: int) -> nn.Module:
        place = self.plan.get(name)
        if place is None or (place.rows, place.width) != (rows, dim):
            raise ValueError(
                f"the plan places {place} where the model has a table {name!r} of {rows} x {dim}"
            )
        first, end = place.span(self.rank)
        if rows * dim >= LARGE:
            # The same rows whatever the placement, and nothing is taken from the seed of the rest
            # of the model.
            block = drawn(name, first, end, dim, place.dtype, self.device, self.seed)
        else:
            block = (
                table(name, rows, dim)
                .weight.detach()[first:end]
                .to(self.device, place.dtype, copy=True)
            )
        if place.sharded:
            module = self.sharded[name] = ShardedEmbedding(block, rows, first)
        else:
            module = nn.Embedding.from_pretrained(block, freeze=False, sparse=True)
        self.modules[name] = module
        return module

    def check(self, model: nn.Module) -> None:
        """Raises ValueError where `model` has a table that was not made here."""
        made = set(self.modules.values())
        for path, module in model.named_modules():
            if (
                isinstance(module, nn.Embedding | nn.EmbeddingBag | ShardedEmbedding)
                and module not in made
            ):
                raise ValueError(
                    f"the model's table {path} is not placed: TokenEncoder must make it by "
                    "`make_table`"
                )


def drawn(
    name: str,
    first: int,
    end: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Tensor:
    """Rows [first, end) of a large table as it begins, on `device`: each depends on seed, name and
    its number alone.
    """
    block = torch.empty(end - first, dim, dtype=dtype, device=device)
    generator = torch.Generator(device)
    for begin in range(first - first % CHUNK_ROWS, end, CHUNK_ROWS):
        entropy = [seed, zlib.crc32(name.encode()), begin]
        generator.manual_seed(
            int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        )
        chunk = torch.empty(CHUNK_ROWS, dim, device=device).normal_(0, 0.02, generator=generator)
        low, high = max(begin, first), min(begin + CHUNK_ROWS, end)
        block[low - first : high - first] = chunk[low - begin : high - begin]
    if first == 0 and end > 0:
        block[0] = 0
    return block


class ShardedTables:
    """All sharded tables of one model, by name, and the messages between the ranks that hold them."""

    def __init__(self, tables: dict[str, ShardedEmbedding], world_size: int) -> None:
        self.tables, self.world_size = tables, world_size
        blocks = [-(-table.num_embeddings // world_size) for table in tables.values()]
        self.widths = [table.embedding_dim for table in tables.values()]
        self.first_slots = [sum(blocks[:i]) for i in range(len(blocks))]
        self.slots = sum(blocks)  # a rank's rows of all tables, numbered through
        first = next(iter(tables.values())).weight
        self.wire = reduce(
            torch.promote_types, (table.weight.dtype for table in tables.values()), first.dtype
        )
        self.block = torch.tensor(blocks, device=first.device)
        self.base = torch.tensor(self.first_slots, device=first.device)
        owners = torch.arange(world_size, device=first.device)[:, None] * self.slots
        self.bounds = torch.cat([(owners + self.base).flatten(), owners[-1] + self.slots])

    @torch.no_grad()
    def fetch(self, codes: dict[str, Tensor]) -> None:
        """Bring the rows that `codes`, int [n] per table, name; all ranks call it together."""
        codes_of = [codes[name].long() for name in self.tables]
        lengths = [len(code) for code in codes_of]
        wanted = torch.cat(codes_of)
        repeats = torch.tensor(lengths).to(wanted.device, non_blocking=True)
        numbers = torch.arange(len(lengths), device=wanted.device)
        table_of = torch.repeat_interleave(numbers, repeats, output_size=len(wanted))
        owner = wanted // self.block[table_of]
        # Ordered by owner, then table, then row: what goes to one rank lies together.
        slot = self.base[table_of] + wanted - owner * self.block[table_of]
        keys, number, index, before = numbered(owner * self.slots + slot, self.bounds)
        counts = before.diff().view(self.world_size, -1)
        self.sent, self.asked = self._host_counts(counts)

        distinct = keys.new_empty(sum(map(sum, self.sent))).scatter_(0, number, keys)
        slots = self._swap(
            distinct % self.slots, [sum(c) for c in self.sent], [sum(c) for c in self.asked]
        )
        pieces = slots.split([c for counts in self.asked for c in counts])
        self.touched = [
            torch.cat(pieces[i :: len(lengths)]) - first for i, first in enumerate(self.first_slots)
        ]
        found = [
            t.weight[rows].to(self.wire)
            for t, rows in zip(self.tables.values(), self.touched, strict=True)
        ]
        rows = self._exchange(found, self.asked, self.sent)

        # A table's rows come from all owners in turn: from the place among all to the place in the
        # table.
        shift = counts.cumsum(0) - counts - before[:-1].view_as(counts)
        index = index + shift[owner, table_of]
        for module, part, at in zip(self.tables.values(), rows, index.split(lengths), strict=True):
            module.rows, module.index = part.float().requires_grad_(), at

    def _host_counts(self, counts: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Distinct rows by rank and table: those that this rank asks for, and those that it is
        asked for.
        """
        asked = self._swap(
            counts.flatten(),
            [counts.shape[1]] * self.world_size,
            [counts.shape[1]] * self.world_size,
        )
        sent, asked = torch.stack([counts, asked.view_as(counts)]).tolist()
        return sent, asked

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per table the rows of this rank's block that any rank used, by their place in it and with
        repeats, and
        their gradients [n, d]; all ranks call it together, after `backward`."""
        grads = []
        for module in self.tables.values():
            assert module.rows is not None and module.rows.grad is not None
            grads.append(module.rows.grad)
            module.rows = module.index = None
        mine = self._exchange(grads, self.sent, self.asked)
        return dict(zip(self.tables, zip(self.touched, mine, strict=True), strict=True))

    def _exchange(
        self, tensors: list[Tensor], to: list[list[int]], of: list[list[int]]
    ) -> list[Tensor]:
        """Per table [n, d], what goes to rank 0 first: `to[rank][table]` rows.

        Back comes the same of `of`.
        """
        if self.world_size == 1:
            return tensors
        split = [tensor.split([counts[i] for counts in to]) for i, tensor in enumerate(tensors)]
        flat = torch.cat(
            [part[rank].flatten() for rank in range(self.world_size) for part in split]
        )
        numbers_to, numbers_of = (
            [[n * d for n, d in zip(row, self.widths, strict=True)] for row in counts]
            for counts in (to, of)
        )
        came = self._swap(flat, [sum(n) for n in numbers_to], [sum(n) for n in numbers_of])
        pieces = came.split([n for numbers in numbers_of for n in numbers])
        return [
            torch.cat(pieces[i :: len(tensors)]).view(-1, width)
            for i, width in enumerate(self.widths)
        ]

    def _swap(self, flat: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        if self.world_size == 1:
            return flat
        came = flat.new_empty(sum(of))
        dist.all_to_all_single(came, flat, list(of), list(to))
        return came


def numbered(keys: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct values of `keys` [n], ascending, without waiting for the device to say how many
    there are.

    Returns `keys` sorted, the number (from 0) of each one's value, the same in the order of `keys`
    as given, and how many distinct values lie below each of `bounds`.
    """
    sorted_keys, order = torch.sort(keys)
    starts = torch.ones_like(keys, dtype=torch.bool)
    starts[1:] = sorted_keys[1:] != sorted_keys[:-1]
    count = starts.cumsum(0)
    below = F.pad(count, (1, 0))[torch.searchsorted(sorted_keys, bounds)]
    return sorted_keys, count - 1, torch.empty_like(order).scatter_(0, order, count - 1), below


# Tables that every rank holds whole


def gather_rows(
    local: dict[str, tuple[Tensor, Tensor]], world_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows that any rank used, and their gradients: each rank's distinct rows, one rank after
    another.

    `local`: per table this rank's rows [n], with repeats, and their gradients [n, d]. Three
    messages, and one wait for the device, whatever the number of tables.
    """
    rows, grads = zip(*local.values(), strict=True)
    first_keys = torch.arange(len(rows) + 1, device=rows[0].device) << TABLE_BITS
    keys = torch.cat([row + first for row, first in zip(rows, first_keys, strict=False)])
    keys, number, index, below = numbered(keys, first_keys)
    counts = _all_gather(below.diff(), world_size).tolist()
    own = counts[dist.get_rank()]
    distinct = keys.new_empty(sum(own)).scatter_(0, number, keys) & ((1 << TABLE_BITS) - 1)
    parts = zip(grads, index.split([len(row) for row in rows]), below, own, strict=False)
    # The backward of a look-up: unlike a sum over segments it is as fast where one row has most of
    # the gradients.
    sums = [
        torch.ops.aten.embedding_dense_backward(grad, at - first, n, -1, False)
        for grad, at, first, n in parts
    ]

    widths = [grad.shape[1] for grad in grads]
    rows_of = _all_gather_jagged(distinct, [sum(c) for c in counts])
    numbers = [[n * width for n, width in zip(c, widths, strict=True)] for c in counts]
    sums_of = _all_gather_jagged(
        torch.cat([part.flatten() for part in sums]), [sum(n) for n in numbers]
    )
    split_rows = [part.split(c) for part, c in zip(rows_of, counts, strict=True)]
    split_sums = [part.split(n) for part, n in zip(sums_of, numbers, strict=True)]
    return {
        name: (
            torch.cat([part[i] for part in split_rows]),
            torch.cat([part[i] for part in split_sums]).view(-1, width),
        )
        for i, (name, width) in enumerate(zip(local, widths, strict=True))
    }


def _all_gather(tensor: Tensor, world_size: int) -> Tensor:
    """[world_size, ...]: the tensors of all ranks, which have the same shape."""
    parts = tensor.new_empty(world_size, *tensor.shape)
    dist.all_gather(list(parts.unbind(0)), tensor)
    return parts


def _all_gather_jagged(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """One flat tensor per rank, `lengths` of them; padded on the wire to the longest."""
    padded = F.pad(tensor, (0, max(lengths) - tensor.numel()))
    return [
        part[:length]
        for part, length in zip(_all_gather(padded, len(lengths)), lengths, strict=True)
    ]

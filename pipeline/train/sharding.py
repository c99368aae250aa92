"""Embedding tables whose rows are split over the ranks in blocks.

    codes of the batch ─▶ distinct rows ─▶ their numbers, to the owners ─▶ the rows, back
        ─▶ looked up as in any table
    gradients of those rows, summed over the rank's batch ─▶ to the owners
        ─▶ row-wise AdamW on their blocks

All tables go together: a step has four messages (counts, row numbers, rows, gradients), however
many there are. The counts of a batch may be asked for while the batch before it is in work
(`ask_counts`): then nobody waits for them. Rows arrive in the order of table and number, gradients
in the order of ranks: two runs agree bit for bit.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.tokens import plain_table
from pipeline.train.placement import Placement
from pipeline.train.waiting import HostNumbers

LARGE = 2**28  # numbers: from here on a table is never whole on a host, and is drawn on its device
CHUNK_ROWS = 2**16  # of a large table, drawn from one seed


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
            block = draw_rows(name, (first, end), dim, place.dtype, self.device, self.seed)
        else:
            whole = plain_table(name, rows, dim).weight.detach()
            block = whole[first:end].to(self.device, place.dtype, copy=True)

        if place.sharded:
            module = self.sharded[name] = ShardedEmbedding(block, rows, first)
        else:
            module = nn.Embedding.from_pretrained(block, freeze=False, sparse=True)
        self.modules[name] = module
        return module

    def check_tables(self, model: nn.Module) -> None:
        """Raises ValueError where `model` has a table that was not made here."""
        made = set(self.modules.values())
        for path, module in model.named_modules():
            is_table = isinstance(module, nn.Embedding | nn.EmbeddingBag | ShardedEmbedding)
            if is_table and module not in made:
                raise ValueError(
                    f"the model's table {path} is not placed: TokenEncoder must make it by "
                    "`make_table`"
                )


def draw_rows(
    name: str,
    span: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Tensor:
    """Rows [first, end) of a large table as it begins, on `device`: each depends on seed, name and
    its number alone.

    They are drawn in chunks that begin at multiples of `CHUNK_ROWS`, each from a seed of its own:

        chunks     [0 … 65535] [65536 … 131071]
        span             [60000 … 70000)
    """
    first, end = span
    block = torch.empty(end - first, dim, dtype=dtype, device=device)
    generator = torch.Generator(device)

    for begin in range(first - first % CHUNK_ROWS, end, CHUNK_ROWS):
        entropy = [seed, zlib.crc32(name.encode()), begin]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(state >> np.uint64(1)))
        chunk = torch.empty(CHUNK_ROWS, dim, device=device).normal_(0, 0.02, generator=generator)

        low, high = max(begin, first), min(begin + CHUNK_ROWS, end)
        block[low - first : high - first] = chunk[low - begin : high - begin]

    if first == 0 and end > 0:
        block[0] = 0
    return block


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows that a batch looks up, by the ranks that hold them; `number_distinct` says what they
    are made of.
    """

    keys: Tensor  # int64 [n], sorted: owner and slot of each code
    number: Tensor  # int64 [n]: of each one's row among the distinct ones
    index: Tensor  # int64 [n], in the order of the batch: where its row will lie in its table's
    lengths: list[int]  # codes of each table
    read_counts: Callable[[], list[list[list[int]]]]  # [sent, asked] by rank and table


class ShardedTables:
    """All sharded tables of one model, and the messages between the ranks that hold them.

    A rank's rows of all tables are numbered through: its slots, a table behind the other.
    """

    def __init__(
        self, tables: dict[str, ShardedEmbedding], world_size: int, numbers: HostNumbers
    ) -> None:
        self.tables, self.world_size, self.numbers = tables, world_size, numbers
        blocks = [-(-table.num_embeddings // world_size) for table in tables.values()]
        self.widths = [table.embedding_dim for table in tables.values()]
        self.first_slots = list(itertools.accumulate(blocks[:-1], initial=0))
        self.slots = sum(blocks)

        first = next(iter(tables.values())).weight
        self.wire = first.dtype
        for table in tables.values():
            self.wire = torch.promote_types(self.wire, table.weight.dtype)

        self.block = torch.tensor(blocks, device=first.device)
        self.base = torch.tensor(self.first_slots, device=first.device)
        owners = torch.arange(world_size, device=first.device)[:, None] * self.slots
        self.bounds = torch.cat([(owners + self.base).flatten(), owners[-1] + self.slots])

    def fetch_rows(self, codes: dict[str, Tensor]) -> None:
        """Bring the rows that `codes`, int [n] per table, name; all ranks call it together.

        One table of 4 rows on 2 ranks, which hold the rows 0 1 and 2 3:

            codes of the batch     3 0 3 1
            owners                 1 0 1 0
            distinct, by owner     0 1 | 3
            slots asked for        0 1 | 1
            rows that come back    r0 r1 r3
            index of the batch     2 0 2 1
        """
        self.bring_rows(self.ask_counts(codes))

    @torch.no_grad()
    def ask_counts(self, codes: dict[str, Tensor]) -> "Wanted":
        """What a batch of these codes needs of each rank, and the message that tells the ranks how
        much; all ranks call it together.
        """
        codes_of = [codes[name] for name in self.tables]
        lengths = list(map(len, codes_of))
        with self.numbers.beside(codes_of):
            wanted = torch.cat(codes_of).long()
            table_of = self._table_numbers(lengths, wanted.device)

            # Ordered by owner, then table, then row: what goes to one rank lies together.
            owner = wanted // self.block[table_of]
            slot = self.base[table_of] + wanted - owner * self.block[table_of]
            keys, number, index, before = number_distinct(owner * self.slots + slot, self.bounds)
            counts = before.diff().view(self.world_size, -1)

            # A table's rows come from all owners in turn: from the place among all to the place in
            # the table.
            shift = counts.cumsum(0) - counts - before[:-1].view_as(counts)
            index = index + shift[owner, table_of]
            return Wanted(keys, number, index, lengths, self._host_counts(counts))

    @torch.no_grad()
    def bring_rows(self, wanted: "Wanted") -> None:
        """The rows of `wanted` into the tables; all ranks call it together."""
        self.sent, self.asked = wanted.read_counts()

        # ask the owners
        distinct = wanted.keys.new_empty(sum(map(sum, self.sent)))
        distinct.scatter_(0, wanted.number, wanted.keys)
        sent, asked = list(map(sum, self.sent)), list(map(sum, self.asked))
        slots = self._swap(distinct % self.slots, sent, asked)

        # answer the others
        self.touched = self._touched_rows(slots)
        found = []
        for table, touched in zip(self.tables.values(), self.touched, strict=True):
            found.append(table.weight[touched].to(self.wire))
        rows = self._exchange(found, self.asked, self.sent)

        indices = wanted.index.split(wanted.lengths)
        for module, part, at in zip(self.tables.values(), rows, indices, strict=True):
            module.rows, module.index = part.float().requires_grad_(), at

    def _table_numbers(self, lengths: list[int], device: torch.device) -> Tensor:
        """int64 [sum of lengths]: the number of each code's table. Lengths 2, 1: 0 0 1."""
        repeats = torch.tensor(lengths).to(device, non_blocking=True)
        numbers = torch.arange(len(lengths), device=device)
        return torch.repeat_interleave(numbers, repeats, output_size=sum(lengths))

    def _touched_rows(self, slots: Tensor) -> list[Tensor]:
        """Per table the rows of this rank's block that the ranks ask for, one rank after another.

        slots of rank 0, then 1    a0 b0 | a0 b1      tables a and b
        per table                  a: 0 0    b: 0 1
        """
        sizes = []
        for counts in self.asked:
            sizes += counts
        pieces = slots.split(sizes)

        touched = []
        for i, first in enumerate(self.first_slots):
            touched.append(torch.cat(pieces[i :: len(self.tables)]) - first)
        return touched

    def _host_counts(self, counts: Tensor) -> Callable[[], list[list[list[int]]]]:
        """Distinct rows by rank and table, when they are read: those that this rank asks for, and
        those that it is asked for.
        """
        if self.world_size == 1:
            return self.numbers.ask(None, lambda: torch.stack([counts, counts]))
        asked = torch.empty_like(counts)
        work = dist.all_to_all_single(asked, counts, async_op=True)
        return self.numbers.ask(work, lambda: torch.stack([counts, asked]))

    def take_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per table the rows of this rank's block that any rank used, by their place in it and with
        repeats, and their gradients [n, d]; all ranks call it together, after `backward`.
        """
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

        Back comes the same of `of`. On the wire the rows of all tables lie together, flat:

            tables a and b, 2 ranks    a0 b0 | a1 b1      a0 the rows of a that go to rank 0
        """
        if self.world_size == 1:
            return tensors

        pieces: list[list[Tensor]] = [[] for _ in to]
        for i, tensor in enumerate(tensors):
            rows_to = [counts[i] for counts in to]
            for of_rank, rows in zip(pieces, tensor.split(rows_to), strict=True):
                of_rank.append(rows.flatten())
        in_order = []
        for of_rank in pieces:
            in_order += of_rank
        flat = torch.cat(in_order)

        sizes_to, sizes_of = self._flat_sizes(to), self._flat_sizes(of)
        came = self._swap(flat, list(map(sum, sizes_to)), list(map(sum, sizes_of)))
        sizes = []
        for of_rank in sizes_of:
            sizes += of_rank
        parts = came.split(sizes)

        tables = []
        for i, width in enumerate(self.widths):
            tables.append(torch.cat(parts[i :: len(tensors)]).view(-1, width))
        return tables

    def _flat_sizes(self, counts: list[list[int]]) -> list[list[int]]:
        """Numbers by rank and table, from the rows of each."""
        sizes = []
        for row in counts:
            sizes.append([n * width for n, width in zip(row, self.widths, strict=True)])
        return sizes

    def _swap(self, flat: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """`to[rank]` numbers of `flat` to each rank; back come `of[rank]` from each."""
        if self.world_size == 1:
            return flat
        came = flat.new_empty(sum(of))
        with self.numbers.clock.count():
            dist.all_to_all_single(came, flat, list(of), list(to))
        return came


def number_distinct(keys: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct values of `keys` [n], ascending, without waiting for the device to say how many
    there are.

    Returns `keys` sorted, the number (from 0) of each one's value, the same in the order of `keys`
    as given, and how many distinct values lie below each of `bounds`.

        keys      7 3 7 5      bounds   0 4 8
        sorted    3 5 7 7
        numbers   0 1 2 2      in the order given   2 0 2 1      below the bounds   0 1 3
    """
    sorted_keys, order = torch.sort(keys)
    starts = torch.ones_like(keys, dtype=torch.bool)
    starts[1:] = sorted_keys[1:] != sorted_keys[:-1]
    count = starts.cumsum(0)

    as_given = torch.empty_like(order).scatter_(0, order, count - 1)
    below = F.pad(count, (1, 0))[torch.searchsorted(sorted_keys, bounds)]
    return sorted_keys, count - 1, as_given, below

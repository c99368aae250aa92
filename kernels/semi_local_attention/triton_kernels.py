"""Triton kernels of semi-local attention: forward, against cached keys, and backward: of queries,
of keys and values, and of the tables of a bias. Each has a file; `triton_row_tile.py` says what a
tile of rows visits, `triton_common.py` holds what all share.

A program is one entry of a tile list (`triton_tiles.py` draws one) and one head; it knows nothing
of the batch or its longest sequence. A row tile visits its keys block by block, in three ranges
that are numbered through:

    keys of a sequence   [prefix]  . . . . . .  [own range]  . . .  [own rows]
    BAND                  0 1                    2 3 4
    FULL                                         0 1 2 3 4 ..
    CANDIDATE                                    0 1 2 3 4 ..        n

A BAND tile's range begins `window` before its first row, the others' at the start of the sequence;
that of candidates which see no further back than `oldest` (FROM) there, behind the prefix.
Only blocks that touch an edge of the mask are masked.

SiLU attention has no row statistics: sums over any parts of the keys simply add. Tiles with many
keys are cut into parts; each part writes its sum to a slot, and the last to arrive adds the slots
in their order, so results do not depend on which part that is.

A block may reach past the end of its sequence, into the next one. Masks make those weights 0, but 0
times NaN is NaN: one user's broken numbers would reach another. So loops end before the first such
block, and a second loop, of one or two blocks as a rule, zeroes the foreign rows (CROSSES). The
first, which does nearly all the work, reads its operands as they lie.

Suffixes: M rows (queries) of a tile, N keys of a tile, D query-key width, V value width.
"""

from kernels.semi_local_attention.triton_backward_bias import backward_bias
from kernels.semi_local_attention.triton_backward_keys import backward_keys
from kernels.semi_local_attention.triton_backward_queries import backward_queries
from kernels.semi_local_attention.triton_forward import forward, forward_cached

__all__ = ["backward_bias", "backward_keys", "backward_queries", "forward", "forward_cached"]

"""What a build is going to meet, told by `--dry-run` from some of the rows: users with very many
rows, and side tables that join nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.logs.cleaning import LogRules, rules_of_file
from pipeline.logs.ids import OwnId, code_ids
from pipeline.logs.rows import open_rows
from pipeline.schema import NAMED_IDS
from pipeline.sequences.side_tables import SideJoin

SAMPLE_ROWS = 2**18
SAMPLE_FILES = 16


@dataclass(frozen=True, slots=True)
class IdSample:
    """The ids of some rows; of rows without a user or without an item none."""

    codes: dict[str, np.ndarray]  # int64, of NAMED_IDS
    examples: dict[str, list[OwnId]]  # a few of each, as people have them
    rows: int  # that were looked at
    no_numbers: dict[str, int]  # of each, rows with a number that no id is: below 0, above int64

    def largest_user(self) -> float:
        """Share of the rows looked at that the user with the most of them has."""
        _, counts = np.unique(self.codes["user_id"], return_counts=True)
        return float(counts.max() / self.rows) if len(counts) else 0.0

    def join(self, column: str, known: np.ndarray) -> SideJoin:
        """How many of the sample's ids are among `known`, the codes of a side table."""
        wanted = np.unique(self.codes[column])
        return SideJoin(len(wanted), int(np.isin(wanted, known).sum()))


def sample_ids(files: Sequence[str], rules: LogRules) -> IdSample:
    """Ids of about SAMPLE_ROWS rows: the first ones of files that are spread over all.

    Raises:
        UserError: a file cannot be read.
    """
    num_files = min(SAMPLE_FILES, len(files))
    places = np.linspace(0, len(files) - 1, num_files)

    rows = 0
    pieces: dict[str, list[np.ndarray]] = {}
    no_numbers: dict[str, int] = dict.fromkeys(NAMED_IDS, 0)
    examples: dict[str, list[OwnId]] = {}
    for name in NAMED_IDS:
        pieces[name], examples[name] = [np.empty(0, np.int64)], []

    for place in places:
        block = _first_rows(files[int(place)], SAMPLE_ROWS // num_files, rules)
        rows += block.num_rows
        of_file = rules_of_file(block.schema, rules)
        coded = code_ids(block, of_file.columns, of_file.readings, of_file.events.text_ids)

        for name in NAMED_IDS:
            known = coded.codes[name].drop_null()
            pieces[name].append(known.to_numpy())
            no_numbers[name] += int(coded.unreadable[name].sum() + (known.to_numpy() < 0).sum())
            if not examples[name]:
                own = coded.pairs[name]["id"] if name in coded.pairs else known
                examples[name] = own.slice(0, 3).to_pylist()

    codes = {name: np.concatenate(found) for name, found in pieces.items()}
    return IdSample(codes, examples, rows, no_numbers)


def _first_rows(file: str, rows: int, rules: LogRules) -> pa.Table:
    with open_rows(file, rules.format, rules.number_ids, rules.named_columns) as opened:
        pieces, count = [opened.schema.empty_table()], 0
        for block in opened.blocks(rows, [0]):
            pieces.append(block.slice(0, rows - count))
            count += pieces[-1].num_rows
            if count >= rows:
                break
        return pa.concat_tables(pieces[1:] or pieces)

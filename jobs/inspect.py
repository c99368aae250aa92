"""Look at a folder of logs and write a preset that builds, trains and serves.

Prints every column with examples and what it is likely to be. Nothing is changed but the file that
-o names.
"""

import argparse
import re
from pathlib import Path

from jobs import cli
from pipeline import config
from pipeline.config import UserError

# what takes seconds to import is imported where it is used

NEXT_JOBS = "build_sequences", "train", "evaluate", "promote", "serve"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.inspect",
        description=__doc__,
        epilog="What the settings mean: docs/guide/data.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="file, folder, pattern or bucket of logs")
    parser.add_argument("--users", metavar="PATH", help="table of users")
    parser.add_argument("--items", metavar="PATH", help="table of items")
    parser.add_argument("--name", help="name of the run; the folder's by default")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the preset here; else it is printed"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    with cli.one_message():
        inspect_logs(options)


def inspect_logs(options: argparse.Namespace) -> None:
    """Print what the logs are likely to be, and write the preset.

    Raises:
        UserError: nothing can be read, no user, item or time is found, or the preset exists or
            cannot be written.
    """
    from pipeline.files import write_atomically
    from pipeline.logs.looking.listing import look_at_logs, look_at_side
    from pipeline.logs.looking.preset import write_preset
    from pipeline.logs.looking.sample import take_sample

    if options.output and Path(options.output).exists():
        raise UserError(f"-o {options.output}: it is there already; name another file")

    tables = {}
    for key, path in (("users", options.users), ("items", options.items)):
        if path:
            tables[key] = take_sample(path, f"--{key}")
    logs, guess = look_at_logs(options.path, tables)
    sides = {key: look_at_side(key, table, logs, guess) for key, table in tables.items()}

    name = options.name or re.sub(r"\W+", "_", Path(options.path).stem).strip("_") or "logs"
    text = write_preset(name, logs, guess, sides.get("users"), sides.get("items"))
    if not options.output:
        print(f"\n{text}", end="")
        return

    try:
        write_atomically(Path(options.output), text)
    except OSError as error:
        raise UserError(f"-o {options.output} cannot be written: {error.strerror}") from error
    config.load(options.output)  # what was written can be read
    print(f"\nwrote {options.output}; next:")
    for job in NEXT_JOBS:
        print(f"  python -m jobs.{job} --config {options.output}")


if __name__ == "__main__":
    main()

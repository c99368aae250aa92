"""The face all jobs share: `--config`, `--set`, `--dry-run`, one message and exit code 2 for a
user's mistake, one message and exit code 1 for an outage, which is worth another try.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import config
from pipeline.config.secrets import MaskingFormatter, mask_secrets
from pipeline.disk import find_disk_fault

if TYPE_CHECKING:
    from pipeline.tracking import RowsAtHand

CHECK_S = 2.0
AGAIN_S = 0.05


@dataclass(frozen=True)
class Job:
    """What a job was asked to do."""

    cfg: config.RunConfig
    options: argparse.Namespace


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the options that have one, and the description in its own paragraphs."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False, [])
        return super()._get_help_string(action) if has_default else action.help


def make_parser(
    name: str, what: str, add_options: Callable[[argparse.ArgumentParser], None] | None
) -> argparse.ArgumentParser:
    """The command line of `python -m jobs.NAME`: options of all jobs, then the job's own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=what,
        epilog="All settings and jobs: docs/reference/configuration.md, docs/reference/jobs.md",
        formatter_class=_HelpFormatter,
    )

    parser.add_argument("--config", required=True, help="YAML preset, see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, train.epochs=1 for instance; may repeat",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and the plan, start nothing",
    )
    if add_options:
        add_options(parser)
    return parser


def run(
    what: str,
    main: Callable[[Job], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    plan: Callable[[Job], dict[str, object]] | None = None,
) -> None:
    """Parse the command line, then `main(job)`.

    `--dry-run` prints the resolved configuration and `plan(job)` (files, rows, resources) and
    starts nothing; `plan` raises `UserError` for what could not run.
    """
    parser = make_parser(Path(sys.argv[0]).stem, what, add_options)
    options = parser.parse_args()
    _set_up_logging()
    # `with` blocks end what they started
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.unraisablehook = _ask_again_to_end

    with one_message():
        job = Job(config.load(options.config, options.overrides), options)
        with _telling_disk_faults(Path(job.cfg.runs_dir)):
            if options.dry_run:
                _print_plan(job.cfg, plan(job) if plan else {})
                return
            main(job)
        # Python's end would look for cycles in all that was imported, for half a second
        gc.freeze()


@contextmanager
def one_message() -> Iterator[None]:
    """End the process with one line for a mistake, an outage and Ctrl-C: codes 2, 1 and 130."""
    try:
        yield
    except (config.UserError, config.Outage) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, config.UserError) else 1)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _telling_disk_faults(runs_dir: Path) -> Iterator[None]:
    """Raise what a disk refuses as one message, wherever it was met."""
    try:
        yield
    except (config.UserError, config.Outage):
        raise
    except Exception as error:
        fault = find_disk_fault(error, runs_dir)
        if fault is None:
            raise
        raise fault from error


def require_task(tasks: Sequence[str], task: str | None) -> None:
    """Go on only if `--promote-if` names a task, or nothing.

    Raises:
        UserError: it names something else.
    """
    if task is not None and task not in tasks:
        raise config.UserError(f"--promote-if: one of the tasks {list(tasks)}, got {task!r}")


def rows_at_hand(cfg: config.RunConfig) -> "RowsAtHand":
    """The validation rows of the run's sequences, for versions that were validated on others."""
    from pipeline.evaluate import evaluator
    from pipeline.evaluate.spread import evaluation_cluster
    from pipeline.tracking import RowsAtHand

    def score(model_dir: Path) -> Mapping[str, float]:
        with evaluation_cluster(cfg.ray, cfg.runs_dir, cfg.sequence_dir):
            return evaluator.score_model(cfg, model_dir)

    return RowsAtHand(evaluator.row_tags(cfg.sequence_dir, cfg.split), score)


def _set_up_logging() -> None:
    """Lines on the console, without secrets; those of a mistake of ours too."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    console = logging.StreamHandler()
    console.setFormatter(MaskingFormatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[console])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request

    def print_masked(kind: type[BaseException], *found: Any) -> None:
        print(mask_secrets("".join(traceback.format_exception(kind, *found))), file=sys.stderr)

    sys.excepthook = print_masked


def _ask_again_to_end(ignored: "sys.UnraisableHookArgs") -> None:
    """Send SIGTERM or Ctrl-C once more where Python has ignored the exception that it raises.

    It does so in the callbacks of objects that end, of which an import has thousands.
    """
    asked = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
    number = asked.get(ignored.exc_type)
    if number is None:
        sys.__unraisablehook__(ignored)
        return

    # from another thread: a signal that came within this function would be ignored, too
    again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _print_plan(cfg: config.RunConfig, planned: dict[str, object]) -> None:
    print(yaml.safe_dump(config.to_dict(cfg), sort_keys=False).rstrip())

    # what belongs together, a table say, on one line
    text = yaml.safe_dump({"plan": planned}, sort_keys=False, default_flow_style=None, width=200)
    print(text.rstrip())


def wait_for_interrupt(check: Callable[[], None] | None = None) -> None:
    """Until Ctrl-C; on TERM the exit passes through here too.

    `check` is called every `CHECK_S` and raises what else ends the wait.
    """
    print("Ctrl-C stops it.", flush=True)

    try:
        while True:
            time.sleep(CHECK_S)
            if check is not None:
                check()
    except KeyboardInterrupt:
        print("\nstopping", flush=True)

"""Run a command that ends with the process that started it: `python -I lifeline.py COMMAND ...`,
standard library only.

The starter holds the other end of this process's standard input. However it dies, by `kill -9` too,
the kernel closes that pipe, and what was started here is ended: the whole process group, which this
process must lead.
"""

import os
import signal
import subprocess
import sys
import threading

STOP_TIMEOUT_S = 15


def main() -> None:
    # TERM to the group is for the command: this process ends when the command does.
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=end_with_input, args=(process,), daemon=True).start()
    sys.exit(process.wait())


def end_with_input(process: subprocess.Popen) -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os.killpg(0, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    finally:  # workers that the command left, or the command itself; and this process
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

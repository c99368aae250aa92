"""Run a command that ends with the last process that uses it: `python -I lifeline.py USERS PROOF
COMMAND ...`, standard library only.

Whoever uses the command holds a shared lock on the file USERS. However such a process ends, by
`kill -9` too, the kernel takes its lock away. When nobody holds one, what was started here is
ended: the whole process group, which this process must lead.

The command and this process hold an exclusive lock on the file PROOF for as long as they live. So
who can open that file knows that the command is the one which was started over it: no other program
can hold that lock, whatever it listens on.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

POLL_S = 0.5
STOP_TIMEOUT_S = 15


def main() -> None:
    users, proof, *command = sys.argv[1:]
    # TERM to the group is for the command: this process ends when the command does.
    signal.signal(signal.SIGTERM, lambda *_: None)

    with open(proof, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[held.fileno()])
        threading.Thread(target=end_without_users, args=(users, process), daemon=True).start()
        sys.exit(process.wait())


def end_without_users(path: str, process: subprocess.Popen) -> None:
    """Wait until nobody uses the command, then end it. Who comes meanwhile waits for its end."""
    with open(path, "a") as users:
        while True:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)

        os.killpg(0, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:  # workers that the command left, or the command itself; and this process
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

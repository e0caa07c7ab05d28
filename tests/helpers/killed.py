"""A command that is killed at one of its own moments: python tests/helpers/killed.py FOLDER EVENT DELAY COMMAND...

EVENT: the number of the thing that it does to a file or folder below FOLDER (opens, makes, renames, removes it), from
any of its threads; DELAY: seconds after that, in which it goes on. COMMAND: a script, or -m and a module. An EVENT that
does not come lets it end by itself. How many there were is left in FOLDER/../events.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.truncate", "shutil.rmtree"}


def main() -> None:
    """Runs the command in this process."""
    folder, event, delay, *command = sys.argv[1:]
    count = 0

    def seen(name: str, arguments: tuple) -> None:
        nonlocal count
        if name not in EVENTS or not arguments or not str(arguments[0]).startswith(folder):
            return
        count += 1
        if count == int(event):
            threading.Thread(target=kill, daemon=True).start()

    def kill() -> None:
        time.sleep(float(delay))
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path[0] = str(Path(command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
    finally:
        (Path(folder).parent / "events").write_text(str(count))


if __name__ == "__main__":
    main()

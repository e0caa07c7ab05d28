"""Steps that compute nothing under a Watchdog: python tests/helpers/watched.py HOW

HOW: "loading", no step has begun; "hanging", the third step never ends, as a save to a lost disk does; "ending", the
step after SIGTERM ends.
"""

import sys
import time

from longlora_jax.resilience import watchdog
from longlora_jax.resilience.watchdog import AGAIN, Watchdog


def hang() -> None:
    """Waits where no line of Python is run."""
    time.sleep(60)


def main() -> None:
    """Says "begun" when SIGTERM may come."""
    how, seconds, watchdog._GRACE_SECONDS = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    with Watchdog(seconds) as watcher:
        print("loading", flush=True)
        if how == "loading":
            hang()
        watcher.begin(0)
        for done in range(1, 1000):
            time.sleep(0.05)
            if done == 3:
                print("begun", flush=True)
                if how == "hanging":
                    hang()
            if watcher.due(done):
                print(f"saved {done}", flush=True)
                sys.exit(AGAIN)


if __name__ == "__main__":
    main()

"""Programs that are started together, each in a forked process of its own."""

import os
import sys
import time
import traceback


def race(works, *, delays, folder):
    """Run functions in forked processes from one moment on.

    Args:
        works: functions that return an exit code.
        delays: seconds of each after that moment.
        folder: for what they print.

    Returns:
        the exit code of each, and what each has printed.
    """
    start, children = time.monotonic() + 0.2, []
    for number, (work, delay) in enumerate(zip(works, delays, strict=True)):
        pid = os.fork()
        if pid == 0:
            _run(work, start + delay, folder / f"{number}.log")
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return codes, [(folder / f"{number}.log").read_text() for number in range(len(codes))]


def _run(work, moment, log):
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            time.sleep(max(0.0, moment - time.monotonic()))
            code = work()
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)

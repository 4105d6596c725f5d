"""Faults at a chosen point: a process killed, a disk full. The product has no hook for them."""

import errno
import multiprocessing
import os
import signal
import sys

import cloudpickle

from sage import files
from sage.training import checkpoint

# Children come from a process without threads of torch, faiss or MLflow, of which a fork of the tests' own would die.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "mlflow.pyfunc", "pytest", "sage.sampling.base", "flows.tracking.registry"])


def in_child(work):
    """Run `work` in a process of its own and return how it ended: an exit code, or minus the signal."""
    child = CLEAN.Process(target=run, args=(cloudpickle.dumps(work), dict(os.environ)))
    child.start()
    child.join()
    ended = child.exitcode
    child.close()
    return ended


def run(work, environment):
    os.environ.clear()
    os.environ.update(environment)
    cloudpickle.loads(work)()


def at_line(number, effect):
    """Cause `effect` before the given line, counted from 1, of what sage.files and training.checkpoint now execute.

    Every point between two calls of the operating system is the start of a line or inside one of Python's own.
    """
    count = 0
    mine = {files.__file__, checkpoint.__file__}

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in mine:
            return None
        if event == "line":
            count += 1
            if count == number:
                effect()
        return trace

    sys.settrace(trace)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    sys.settrace(None)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

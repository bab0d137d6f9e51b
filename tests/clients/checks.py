"""Named checks: each prints one line, and a failed one makes the process exit with 1."""

import contextlib
import sys
import time
import traceback

_failed = []


def check(condition, what):
    """Fails the running check with `what` unless `condition` holds."""
    if not condition:
        raise AssertionError(what)


def equal(got, expected, what):
    """Fails the running check unless both are equal."""
    check(got == expected, f"{what}: got {got!r}, expected {expected!r}")


@contextlib.contextmanager
def raises(kind, what):
    """Fails the running check unless the block raises `kind`; what is raised is in the list it yields."""
    caught = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    check(caught, f"{what}: no {kind.__name__} was raised")


def eventually(condition, what, seconds=10.0):
    """Asks `condition` until it holds; fails the running check after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, f"{what}: not within {seconds} s")
        time.sleep(0.02)


def run(name, function, *args):
    """Runs one check."""
    try:
        function(*args)
        print(f"ok    {name}", flush=True)
    except Exception:  # A client's own errors are failures of the check too.
        _failed.append(name)
        print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)


def run_all(module, *args):
    """Runs every function of `module` named `check_…`, in the order in which they are written."""
    for name, function in list(vars(module).items()):
        if name.startswith("check_") and callable(function):
            run(name.removeprefix("check_"), function, *args)


def finish():
    """Exits with 1 if a check failed."""
    if _failed:
        sys.exit(f"{len(_failed)} failed: {', '.join(_failed)}")
    print("all checks passed")

"""Calls of main, in this process and in others, and what they come to."""

import contextlib
import io
import multiprocessing
import os
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_pvs


def call(*argv):
    """Call main; return (status, stdout, stderr)."""
    screen, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        status = train_pvs.main([str(word) for word in argv])
    return status, screen.getvalue(), errors.getvalue()


def done(result):
    """See that a call ended with 0 and nothing on stderr; return its stdout."""
    status, out, err = result
    assert (status, err) == (0, ""), (status, err)
    return out


def trained(result):
    """See that a training came to its end, even if it learned nothing; return its stdout."""
    status, out, err = result
    assert status in (0, 1), err
    return out


def refused(result, *told):
    """See that a call ended with 2 and one error, which has all these words; return its stderr."""
    status, _, err = result
    missing = [word for word in map(str, told) if word not in err]
    errors = err.count("Error: ")
    told = f"{status}, {errors} errors, lacks {missing}: {err[:1000]}"
    assert (status, errors, missing, "Traceback" in err) == (2, 1, [], False), told
    return err


def array_of(path):
    return np.asarray(nib.load(path).dataobj)


def draw_nothing(patch):
    """Leave out the drawing of figures, which takes most of so short a run."""
    patch.setattr(train_pvs.Figure, "savefig", lambda self, file, **_: file.write(b"-"))


def members(group):
    """Return the processes of a group, without those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = path.read_text().rsplit(") ", 1)[1].split()[:3]
            found += [int(path.parent.name)] * (int(its_group) == group and state not in "ZX")
    return found


def wait_until(true, told, seconds=60):
    """Wait till a function gives something true; fail with `told` after these seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, told()
        time.sleep(0.005)


def live(function, argv, screens, environment, hook):
    """Be a process, and a group, of its own; `screens`: the files, or terminal, of its output."""
    os.setpgid(0, 0)
    for number, name, screen in zip((1, 2), ("stdout", "stderr"), screens, strict=True):
        os.dup2(os.open(screen, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of the run's workers
    draw_nothing(pytest.MonkeyPatch())
    if hook:
        hook[0](*hook[1:])
    sys.exit(function(argv))

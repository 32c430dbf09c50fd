"""A disk store in a folder, and what its tests ask of it."""

import contextlib
import gc
import os
import stat
from pathlib import Path

import pytest

from ragkv.errors import StoreError


@contextlib.contextmanager
def keeping_descriptors():
    """Afterwards as many files are open as before."""
    before = descriptors()
    yield
    if descriptors() != before:
        gc.collect()  # the traceback of an error holds what its calls held
    assert descriptors() == before


def descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def reason(call, *arguments):
    with pytest.raises(StoreError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return error.value.reason


def raising(number):
    """A system call that fails so."""

    def fail(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return fail


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)

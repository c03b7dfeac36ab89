"""The exceptions themselves; that each failure raises its class is shown where the failure is."""

from __future__ import annotations

import errno
import pickle

import pytest

import lmcache_native as native
from lmcache_native import errors

pytestmark = pytest.mark.unit

BUILTIN = {
    "InvalidArgument": ValueError,
    "NotFound": KeyError,
    "DeadlineExceeded": TimeoutError,
    "IoError": OSError,
    "Unsupported": NotImplementedError,
}
CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, native.LmcacheNativeError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_message_code_and_errno(cls: type[native.LmcacheNativeError]) -> None:
    error = cls("chunk 'a' is gone", 28)
    assert str(error) == "chunk 'a' is gone"
    assert (error.message, error.sys_errno) == ("chunk 'a' is gone", 28)
    assert isinstance(error, BUILTIN.get(cls.__name__, Exception))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.sys_errno) == (cls, str(error), 28)


def test_codes_are_distinct() -> None:
    leaves = [c for c in CLASSES if c not in (native.LmcacheNativeError, native.CudaUnavailable)]
    assert len({c.code for c in leaves}) == len(leaves) == 12
    assert native.CudaUnavailable.code == native.Unavailable.code


def test_io_error_is_an_os_error_with_its_number() -> None:
    error = native.IoError("pwrite /x: No space left on device (28)", errno.ENOSPC)
    assert error.errno == errno.ENOSPC
    assert native.IoError("short read").errno is None

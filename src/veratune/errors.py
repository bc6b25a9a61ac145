"""Every error that veratune raises on purpose.

    VeratuneError
    ├── ConfigError          a setting has a wrong name, type or value
    ├── TargetError          the targets do not fit the model
    ├── ShapeError           a tensor has another shape than the mathematics wants
    ├── AdapterError         an adapter's name is unknown, taken, or in the wrong state
    ├── UnsupportedError     the request is understood and cannot be met; the reason is given
    ├── AdapterFileError     a file is not a readable adapter
    │   ├── BasisError       the frozen matrices here are not those the adapter was trained with
    │   └── BaseModelError   the adapter was trained on another base model
    ├── DataError            a data set is missing, empty or has other columns than asked for
    ├── BusyError            too many requests are waiting; one may come again later
    ├── BankFullError        every slot for adapters is in use now
    ├── JudgeError           a judge cannot be asked, or gives no rating
    ├── StoreError           a store of adapters cannot do what it was asked
    │   ├── UnknownAdapterError  it has no such adapter or version
    │   └── BadNameError         a tenant or an adapter cannot have this name
    ├── UnknownJobError      there is no such job or file
    ├── ClosedError          the server is going down
    └── OutputError          the result could not be written

Each message is one line: what was found, what was wanted, what to do.
"""

import difflib
from collections.abc import Iterable


class VeratuneError(Exception):
    """Root of the tree: ``except VeratuneError`` catches all of it and nothing else."""


class ConfigError(VeratuneError, ValueError):
    """A setting has a wrong name, type or value."""


class TargetError(VeratuneError, ValueError):
    """The targets do not fit the model."""


class ShapeError(VeratuneError, ValueError):
    """A tensor has another shape than the mathematics wants."""


class AdapterError(VeratuneError, LookupError):
    """An adapter's name is unknown, taken, or the adapter is in the wrong state for the request."""


class UnsupportedError(VeratuneError):
    """The request is understood and cannot be met."""


class AdapterFileError(VeratuneError, ValueError):
    """A file is not a readable adapter."""


class BasisError(AdapterFileError):
    """The frozen matrices made here are not those the adapter was trained with."""


class BaseModelError(AdapterFileError):
    """The adapter was trained on another base model."""


class DataError(VeratuneError, ValueError):
    """A data set is missing, empty or has other columns than asked for."""


class BusyError(VeratuneError):
    """Too many requests are waiting; this one may come again later."""


class BankFullError(VeratuneError):
    """Every slot for adapters is in use now; a request may come again later."""


class JudgeError(VeratuneError):
    """A judge cannot be asked, or gives no rating."""


class StoreError(VeratuneError):
    """A store of adapters cannot do what it was asked."""


class UnknownAdapterError(StoreError, LookupError):
    """A store has no such adapter, or no such version of it."""


class BadNameError(StoreError, ValueError):
    """A tenant or an adapter cannot have this name."""


class UnknownJobError(VeratuneError, LookupError):
    """A tenant has no such fine-tuning job, or no such file of rows."""


class ClosedError(VeratuneError):
    """The server is going down and takes no more requests, or went down before an answer was whole."""


class OutputError(VeratuneError, OSError):
    """The result could not be written; what stood there before is untouched."""


def near(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known words closest to `word`, as the end of an error message.

    >>> near("quary", ["query", "value"])
    "; did you mean 'query'?"
    >>> near("zzz", ["query", "value"])
    ''
    """
    found = difflib.get_close_matches(word, sorted(set(known)), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""

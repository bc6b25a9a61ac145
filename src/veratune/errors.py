"""Every error that veratune raises on purpose.

    VeratuneError
    ├── ConfigError          a setting has a wrong name, type or value
    ├── TargetError          the targets do not fit the model
    ├── ShapeError           a tensor has the wrong shape
    ├── AdapterError         an adapter cannot do what was asked
    │   ├── AdapterNotFoundError  the model or the store has no adapter of this name or version
    │   ├── AdapterStateError     wrong state: merged, attached twice, ...
    │   └── InvalidNameError      an adapter or a tenant cannot have this name
    ├── UnsupportedError     valid, but veratune cannot do it; the message says why
    ├── AdapterFileError     a file is not a readable adapter
    │   ├── BasisError       the frozen matrices A and B differ from those of training
    │   └── BaseModelError   the adapter was trained on another base model
    ├── DataError            a data set is missing, empty, or has the wrong columns
    ├── QueueFullError       too many requests wait; retry later
    ├── PoolFullError        every adapter slot is in use; retry later
    ├── RewardError          a reward function raised, or returned no finite number
    ├── JudgeError           a judge cannot be reached, or returns no rating
    ├── StoreError           an adapter store cannot be read or written
    ├── JobNotFoundError     the tenant has no such fine-tuning job or file
    ├── InUseError           a file is needed by a fine-tuning job
    ├── ShutdownError        the server is shutting down
    ├── OutputError          the result could not be written
    ├── DivergedError        the loss of a training run is not a finite number
    └── InterruptedRunError  a training run was ended by a signal after writing a checkpoint

Each message is one line: what was found, what was wanted, what to do.
"""

import difflib
from collections.abc import Iterable


class VeratuneError(Exception):
    """The root of the tree: ``except VeratuneError`` catches every error below and no other."""


class ConfigError(VeratuneError, ValueError):
    """A setting has a wrong name, type or value."""


class TargetError(VeratuneError, ValueError):
    """The targets do not fit the model."""


class ShapeError(VeratuneError, ValueError):
    """A tensor has the wrong shape."""


class AdapterError(VeratuneError):
    """An adapter cannot do what was asked."""


class AdapterNotFoundError(AdapterError, LookupError):
    """The model or the store has no adapter of this name, or no such version of it."""


class AdapterStateError(AdapterError, RuntimeError):
    """The adapter or the model is in the wrong state for this call."""


class InvalidNameError(AdapterError, ValueError):
    """An adapter or a tenant cannot have this name."""


class UnsupportedError(VeratuneError):
    """The request is valid but veratune cannot do it."""


class AdapterFileError(VeratuneError, ValueError):
    """A file is not a readable adapter."""


class BasisError(AdapterFileError):
    """The frozen matrices A and B differ from those the adapter was trained with."""


class BaseModelError(AdapterFileError):
    """The adapter was trained on another base model."""


class DataError(VeratuneError, ValueError):
    """A data set is missing, empty, or has the wrong columns."""


class QueueFullError(VeratuneError):
    """Too many requests wait; retry later."""


class PoolFullError(VeratuneError):
    """Every adapter slot is in use; retry later."""


class RewardError(VeratuneError, RuntimeError):
    """A reward function raised, or returned no finite number."""


class JudgeError(VeratuneError):
    """A judge cannot be reached, or returns no rating."""


class StoreError(VeratuneError):
    """An adapter store cannot be read or written."""


class JobNotFoundError(VeratuneError, LookupError):
    """The tenant has no such fine-tuning job, or no such uploaded file."""


class InUseError(VeratuneError):
    """A file is needed by an unfinished fine-tuning job."""


class ShutdownError(VeratuneError):
    """The server is shutting down: it takes no more requests and aborts running ones."""


class OutputError(VeratuneError, OSError):
    """The result could not be written; an existing file is untouched."""


class DivergedError(VeratuneError, ArithmeticError):
    """The loss of a training run is not a finite number."""


class InterruptedRunError(VeratuneError):
    """A training run was ended by SIGTERM or Ctrl-C after writing a checkpoint."""


def near(word: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known words closest to `word`, worded as the end of an error message.

    >>> near("quary", ["query", "value"])
    "; did you mean 'query'?"
    >>> near("zzz", ["query", "value"])
    ''
    """
    matches = difflib.get_close_matches(word, sorted(set(known)), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""

"""The errors that users of the engine meet, each with the exit code that a tool ends with.

    EngineError              1   something else went wrong
    ├── ConfigError          2   the config or the command line is not acceptable
    ├── DataError            3   the data cannot be used as it is
    ├── GateError            4   a promise was not kept (parity, quality, hashes)
    └── MachineError         5   the machine refuses: disk full, folder not writable, no memory, locked

Every message says what must hold, what was received, where, and what to do. A tool that is interrupted
ends with 130. `serving` has a tree of its own in `serving/errors.py`.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors that are answered with one sentence instead of a traceback."""

    exit_code = 1


class ConfigError(EngineError):
    """A setting is unknown, out of range or contradicts another."""

    exit_code = 2


class DataError(EngineError):
    """The tables or files of a data set cannot be used."""

    exit_code = 3


class GateError(EngineError):
    """A check that guards a promise failed: numbers differ, a hash does not match."""

    exit_code = 4


class MachineError(EngineError):
    """Disk, memory, permissions or another process stand in the way."""

    exit_code = 5


INTERRUPTED = 130

"""What all tools share: errors as one sentence with a documented exit code, and a clean stop on Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

EXIT_CODES = """exit codes:
  0 done   1 something unexpected   2 config or command line   3 data   4 a promise was not kept (parity, hashes)
  5 the machine refuses (disk, permissions, memory, lock)   130 interrupted
"""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser that shows examples and exit codes under its options."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; received {text}")
    return number


def from_zero(text: str) -> float:
    """The type of an option that is a number from 0 on."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, as in 0.01 or 20; received {text}")
    return number


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """The type of an option that is a number of bytes, such as 5MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a number of B, kB, MB or GB, as in 5MB; received {text}")
    return round(float(found[1]) * UNITS[found[2]])


def run(main: Callable[[], int | None], *, resume: str = "run the same command again to continue") -> None:
    """Calls `main` and ends the process with its exit code; errors of ours become one sentence on stderr."""
    from fusion.errors import INTERRUPTED, EngineError, MachineError

    try:
        code = main() or 0
        sys.stdout.flush()  # here, where a reader that has gone or a full disk is still answered
        sys.exit(code)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\ninterrupted: everything finished so far is kept; {resume}.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        _leave_stdout()
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _leave_stdout()
            print(f"error: there must be room to write; received '{error}'. Free some space.", file=sys.stderr)
            sys.exit(MachineError.exit_code)
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}; please report it with the lines above.", file=sys.stderr)
        sys.exit(1)


def _leave_stdout() -> None:
    """What could not be written stays unwritten: Python would try once more at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

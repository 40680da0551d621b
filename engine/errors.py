"""A user's mistake becomes one line on stderr and exit status 2."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from reelm.tokenizers.memory import out_of_memory

MISTAKES = (ValueError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError,
            FloatingPointError, MemoryError, OSError)  # fmt: skip


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def one_line_errors(program: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a program; its mistakes print one line. `REELM_TRACEBACK=1` shows where they came from."""

    @functools.wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return program(*args, **kwargs)
        except Exception as error:
            # the latter is Lightning's, which not all programs import
            mistake = isinstance(error, MISTAKES) or type(error).__name__ == "MisconfigurationException"
            mistake = mistake or out_of_memory(error)
            if not mistake or os.environ.get("REELM_TRACEBACK"):
                raise
            print(f"error: {first_line(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run

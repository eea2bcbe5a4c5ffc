"""Exit codes, and the errors that are messages for a person."""

from __future__ import annotations

GUIDE = "docs/troubleshooting.md"

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_PREFLIGHT = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, checkpoint saved, run again to go on
EXIT_INTERRUPTED = 130  # a second Ctrl-C, or one before training began


def see(section: str) -> str:
    """Return where the guide says more, for the end of a message; `section` is the anchor of a heading."""
    return f"see {GUIDE}#{section}"


class UsageError(ValueError):
    """Bad usage or bad input: says what, where and what to do. Ends a script with exit code 2."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved is intact. Ends a script with exit code 1 and no traceback."""


class LostProcessError(TrainingError):
    """Other processes crashed, hang or cannot be reached. Every process that notices says so."""


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out, on a device or on the host, where torch (2.13) says so in the message only."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator" in str(error)


def is_of_exchange(error: Exception) -> bool:
    """Say whether an error is of torch's exchange between processes, which fails where one of them is gone."""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))

"""What a check of preflight says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    status: Status
    measured: str
    expected: str
    causes: tuple[str, ...] = ()  # likely ones, the likeliest first, each with what to try
    values: dict[str, Any] = field(default_factory=dict)  # the numbers behind it, plain values
    stop: bool = False  # what comes after it could not be carried out
    seconds: float = 0.0  # that the check took


def judge(
    check: str,
    ok: bool,
    measured: str,
    expected: str,
    causes: tuple[str, ...] = (),
    *,
    otherwise: Status = "fail",
    stop: bool = False,
    **values: Any,
) -> Finding:
    """Return a finding that passes if `ok`, and else is `otherwise`, has causes and may stop what comes after."""
    if ok:
        return Finding(check, "pass", measured, expected, values=values)
    return Finding(check, otherwise, measured, expected, causes, values, stop)


def skip(check: str, reason: str) -> Finding:
    """Return a finding of a check that does not apply here."""
    return Finding(check, "skip", reason, "")


def number(value: float) -> str:
    """Return a number as people read it: three digits."""
    return f"{value:.3g}"


def listing(names: list[str], most: int = 5) -> str:
    """Return names in a line, the first few of them."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")

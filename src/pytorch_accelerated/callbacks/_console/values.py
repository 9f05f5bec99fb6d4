"""Numbers, learning rates, durations and time left, as a person reads them."""

from __future__ import annotations

import math

_MINUTE, _HOUR = 60, 3600  # seconds


def number_text(value: float) -> str:
    """Return a number with four significant digits; an integer as it is.

    Example:
        >>> [number_text(value) for value in (1.20345, 0.5, 1234567.0, 0.00001234, 12)]
        ['1.203', '0.5000', '1.235e+06', '1.234e-05', '12']
    """
    if isinstance(value, int):
        return str(value)
    return f"{value:#.4g}".removesuffix(".")


def learning_rate_text(learning_rate: float) -> str:
    """Return a learning rate with two significant digits, always as a power of ten, so that its column stays narrow.

    Example:
        >>> learning_rate_text(0.0021)
        '2.1e-03'
    """
    return f"{learning_rate:.1e}"


def duration_text(seconds: float) -> str:
    """Return a duration: tenths of a second below a minute, then minutes and hours.

    Example:
        >>> [duration_text(seconds) for seconds in (12.44, 59.97, 108, 7384)]
        ['12.4s', '1:00', '1:48', '2:03:04']
    """
    if round(seconds, 1) < _MINUTE:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def seconds_left(num_done: float, num_total: float | None, seconds: float) -> float | None:
    """Return how long the rest takes if it goes on at the same pace.

    Args:
        num_done: How much is done: batches or updates, within the time measured.
        num_total: How much is to be done, including what is done; ``None`` if that is not known.
        seconds: How long it took so far.

    Returns:
        Seconds, at least 0; ``None`` if nothing is done yet, or the total is not known.
    """
    if num_total is None or num_done <= 0 or not math.isfinite(num_total):
        return None
    return max(0.0, (num_total - num_done) * seconds / num_done)

"""Numbers, learning rates, durations and time left, as a person reads them."""

from __future__ import annotations

NUMBER_WIDTH = 9
"""The most characters of a number with four significant digits that is not negative: 0.0001234, 1.235e-05."""

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


def time_left_text(seconds: float | None) -> str:
    """Return how long something still takes, in whole seconds; nothing if it is not known.

    Example:
        >>> [time_left_text(seconds) for seconds in (12.44, 108, None)]
        ['12s', '1:48', '']
    """
    if seconds is None:
        return ""
    return f"{round(seconds)}s" if round(seconds) < _MINUTE else duration_text(round(seconds))


def speed_text(per_second: float) -> str:
    """Return how many there are in a second, with at least three significant digits.

    Example:
        >>> [speed_text(speed) for speed in (12345.6, 1234.5, 12.34, 0.5678)]
        ['12,346', '1,234', '12.3', '0.568']
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def title_of(metric_name: str) -> str:
    """Return what a metric is called on the screen.

    Example:
        >>> [title_of(name) for name in ("train_loss_epoch", "far_intermediate_eval_loss_epoch", "lr")]
        ['train loss', 'far eval loss', 'lr']
    """
    return metric_name.replace("intermediate_", "").removesuffix("_epoch").replace("_", " ")

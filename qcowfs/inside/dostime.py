"""Dates and times of FAT and exFAT. Pure; used by their readers.

They are local times of a time zone that FAT does not record; they are taken for UTC, as Linux does where it was not
told otherwise.
"""

from __future__ import annotations

import calendar

__all__ = ["from_dos"]

EPOCH_YEAR = 1980


def from_dos(date: int, time: int, hundredths: int = 0) -> tuple[int, int]:
    """Return seconds since 1970 and nanoseconds.

    Args:
        date: 7 bits of years since 1980, 4 of the month, 5 of the day; a month or a day of 0 counts as 1.
        time: 5 bits of hours, 6 of minutes, 5 of seconds by two.
        hundredths: of a second, up to 199, that come on top.
    """
    year, month, day = EPOCH_YEAR + (date >> 9), min(max(date >> 5 & 15, 1), 12), max(date & 31, 1)
    seconds = calendar.timegm((year, month, 1, time >> 11, time >> 5 & 63, 2 * (time & 31)))
    return seconds + (day - 1) * 86400 + hundredths // 100, hundredths % 100 * 10_000_000

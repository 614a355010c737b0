"""What a unit of a disk means for the file that it is written to; the numbers are those of _copy.classify().

Used by the writers.
"""

SAME = 0  # the file shows it without being written: a hole, or what the backing file has
ZEROS = 1  # zeros, where the backing file has something else
DATA = 2

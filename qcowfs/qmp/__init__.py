"""A machine that is running, asked by QMP: which images a device has, when they change, and the order for a snapshot.

Used by the command line. Only queries are sent, apart from the one order of `snapshot`; every exchange has a limit of
time, and what a monitor answers is checked like what an image holds.
"""

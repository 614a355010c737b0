"""qcowfs: every snapshot in a qcow2 disk image, side by side and read-only: the disks, and the files inside."""

__version__ = "0.1.0"

"""qcowfs: every snapshot in a qcow2 disk image, side by side, as read-only raw disks."""

__version__ = "0.1.0"

"""Figures against qemu-storage-daemon's FUSE export, taken in one run on the same images: `make bench`."""

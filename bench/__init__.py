"""`make bench`: figures of this checkout against other programs that show a qcow2 image as a file, in one run."""

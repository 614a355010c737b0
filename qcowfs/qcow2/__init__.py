"""qcow2's on-disk structures, parsed and checked once into frozen objects."""

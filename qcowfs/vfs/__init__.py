"""What a mount looks like, without FUSE types: names, inode numbers, nodes and the tree that holds them.

Used by fuse.py, which only translates, and by `qcowfs list` for the names. Everything here runs in one thread except
`DiskFile.count`, which may take long and says so.
"""

"""What is inside a disk: partitions, logical volumes, and the trees of files that they hold.

volume, partitions, lvm, filesystems: which volumes a disk has, and what each of them holds; plain Python, from a few
reads. reader, record, and one file for each family of file systems: how a tree is read; only ever in a worker process
(worker, launcher, client), which has no descriptor but its socket and asks for every block. jbd2 recovers the journal
of ext3 and ext4 there, as an overlay; it uses extsuper, journal, journalmap, fastcommit, fastreplay and draft.
docs/decisions/0007-inside.md says why.
"""

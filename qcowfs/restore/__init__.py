"""Copies files and trees out of points into directories of this machine, as `cp -a` would from a mount.

Used by `qcowfs restore`. One thread. What is written goes by descriptors of directories, never by paths: no symbolic
link of the tree, or of others who may write there, leads anywhere.
"""

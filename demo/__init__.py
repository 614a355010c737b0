"""`make demo`: the whole story on a real virtual machine."""

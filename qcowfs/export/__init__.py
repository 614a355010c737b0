"""Points written to files of their own: raw, stand-alone qcow2, or a chain of overlays. Used by `qcowfs export`."""

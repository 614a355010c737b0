"""Where bytes come from: files and block devices today. Knows no image format."""

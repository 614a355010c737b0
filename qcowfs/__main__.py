"""`python -m qcowfs` is `qcowfs`."""

import sys

from qcowfs.cli import main

sys.exit(main())

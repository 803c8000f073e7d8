"""What carries the experiment: a module for each job. A first reading of the project can skip this folder."""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or later is needed; this is {sys.version.split()[0]}")

"""`python -m fedspine`."""

import sys

from fedspine.cli import main

sys.exit(main())

"""`python -m megatron_egrsd` is the command line."""

import sys

from megatron_egrsd.cli import main

if __name__ == "__main__":
    sys.exit(main())

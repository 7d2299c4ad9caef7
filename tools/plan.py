"""The older name of `megatron-egrsd plan`, kept for one release."""

import sys

from megatron_egrsd.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]], name="plan.py"))

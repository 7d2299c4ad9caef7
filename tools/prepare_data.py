"""The older name of `megatron-egrsd prepare-data`, kept for one release."""

import sys

from megatron_egrsd.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-data", *sys.argv[1:]], name="prepare_data"))

"""The older name of `megatron-egrsd convert`: python tools/convert_hf.py to-megatron|to-hf|verify ..."""

import sys

from megatron_egrsd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]], name="convert_hf"))

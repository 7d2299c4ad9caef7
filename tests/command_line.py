"""A command of megatron-egrsd in the process of the test, which spares the start of an interpreter."""

import contextlib
import io
from types import SimpleNamespace

from megatron_egrsd import cli


def run_command(*words) -> SimpleNamespace:
    """Run `megatron-egrsd WORDS`; its exit status and texts, by the names that subprocess has for them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(word) for word in words])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

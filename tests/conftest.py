"""Settings for every test."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.copies import Source, not_copied

# Tests interrupt the processes that they start. A shell's background job ignores Ctrl-C, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No timed assertions: machines are noisy, and the first example often pays for an import. The same examples each time,
# so that a change is judged by its own merits; `make fuzz` draws others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def source() -> Iterator[Source]:
    """Used by the directories whose tests start servers and whole runs."""
    with Source() as source:
        yield source


@pytest.fixture
def new_interpreters() -> Iterator[None]:
    """For tests of the start of a process."""
    with not_copied():
        yield

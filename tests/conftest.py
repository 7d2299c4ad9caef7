"""Settings for every test."""

import signal

from hypothesis import settings

# A background job of a shell ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No timed assertions: machines are noisy, and the first example often pays for an import.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

"""Settings for every test."""

import signal

from hypothesis import settings

# Tests interrupt the processes that they start. A shell's background job ignores Ctrl-C, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No timed assertions: machines are noisy, and the first example often pays for an import.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

"""The errors that users see. The command line prints each as one line and exits with its status."""


class BadArgument(ValueError):
    """A request that cannot work: a wrong key, path, size or dataset. Nothing was started."""

    exit_status = 2


class RunError(RuntimeError):
    """A failure while running: a server died, a sync was corrupted, a deadline passed."""

    exit_status = 1


class Preempted(RunError):
    """A request to stop the run (SIGTERM)."""

    exit_status = 0


class Interrupted(Preempted):
    """A stop of the run by Ctrl-C, after which it was saved."""

    exit_status = 130

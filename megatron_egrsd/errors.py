"""The errors that users see. The command line prints each as one line and exits with its status."""


class BadArgument(ValueError):
    """The request itself cannot work: a wrong key, path, size or dataset. Nothing was started."""

    exit_status = 2


class RunError(RuntimeError):
    """Something failed while running: a server died, a sync was corrupted, a deadline passed."""

    exit_status = 1


class Preempted(RunError):
    """The run was asked to stop (SIGTERM)."""

    exit_status = 0


class Interrupted(Preempted):
    """The run was stopped by Ctrl-C, and saved."""

    exit_status = 130

"""The errors that users see. The command line prints each as one line and exits with its status."""


class BadArgument(ValueError):
    """The request itself cannot work: a wrong key, path, size or dataset. Nothing was started. Exit status 2."""


class RunError(RuntimeError):
    """Something failed while running: a server died, a sync was corrupted, a deadline passed. Exit status 1."""


class Preempted(RunError):
    """The run was asked to stop (SIGTERM). Exit status 0."""


class Interrupted(Preempted):
    """The run was stopped by Ctrl-C, and saved. Exit status 130."""

"""The errors a user meets. The command line prints each as one line and exits with its status."""


class BadArgument(ValueError):
    """The request itself cannot work: a wrong key, path, size or dataset. Nothing was started. Exit status 2."""


class RunError(RuntimeError):
    """Something failed while running: a server died, a sync was corrupted, a deadline passed. Exit status 1."""


class Preempted(RunError):
    """The run was asked to stop (SIGTERM). Exit status 0."""


class BadUpdate(Exception):
    """An update that would have spoiled the weights, and was not made. Every rank meets it alike; no user does.

    Attributes:
        kind: What is wrong: "gradient", or as the caller of `Engine.train_step` calls it.
        sums: What the loss reported.
    """

    def __init__(self, kind: str, sums: dict[str, float]):
        super().__init__(kind)
        self.kind, self.sums = kind, sums

"""Settings for every test."""

from hypothesis import settings

# No timed assertions: machines are noisy, and the first example often pays for an import.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

"""What this library raises, as one tree."""


class SageError(Exception):
    """The base of every error raised on purpose; its message says what is wrong and what to do."""


class ConfigurationError(SageError):
    """`params.yaml` or an argument asks for something unknown, ill-typed or contradictory."""


class DataError(SageError):
    """Input data cannot be used: missing, empty, or with no valid pair of picture and caption."""


class PlanError(SageError):
    """A sharing plan is impossible or does not belong to these prompts."""


class UnsupportedError(SageError):
    """A scheduler or a pipeline of a kind that shared sampling cannot drive."""


class CheckpointError(SageError):
    """Saved state is damaged or belongs to another configuration."""


class DivergedError(SageError):
    """Training produced a loss or a gradient that is not finite."""


class MetricError(SageError):
    """A metric is missing, not finite, or was not measured on the expected set."""


class RegistryError(SageError):
    """A registered version is damaged, or a promotion is not allowed."""

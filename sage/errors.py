"""The exceptions of this library; all derive from SageError."""

from collections.abc import Mapping


class SageError(Exception):
    """Base of all errors of this library; the message says what is wrong and what to do about it."""


class ConfigurationError(SageError):
    """`params.yaml` or an argument is unknown, of the wrong type, out of range or contradicts another setting."""


class DataError(SageError):
    """Input data cannot be used: missing, empty, damaged, of the wrong shape, or without a valid image and caption."""


class PlanError(SageError):
    """A sharing plan is impossible, cannot reach the requested saving, or does not match prompts or scheduler."""


class UnsupportedError(SageError):
    """Shared sampling or training does not support this scheduler, pipeline or network."""


class CheckpointError(SageError):
    """A saved model or training state is damaged, incomplete or of another configuration."""


class DivergedError(SageError):
    """Training or sampling produced values that are not finite: a loss, a gradient, weights, latents or images.

    `images` says for each such image, by its index in the call, what is not finite and what to do.
    """

    def __init__(self, message: str, images: Mapping[int, str] | None = None) -> None:
        """Take the message; `images` if the error is of single images."""
        super().__init__(message)
        self.images = dict(images or {})


class MetricError(SageError):
    """A metric is missing, not finite, or was measured on a different set of prompts and images."""


class RegistryError(SageError):
    """A registered model version is missing or damaged, or its promotion is not allowed."""

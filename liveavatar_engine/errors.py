"""What can go wrong, as the caller sees it: every message names the thing and says what was expected."""


class LiveAvatarError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LiveAvatarError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class InputError(LiveAvatarError, ValueError):
    """An image, audio, video, mask or prompt given by the user cannot be used."""


class CheckpointError(LiveAvatarError):
    """A checkpoint or adapter file is missing, damaged or belongs to another model."""


class OutputError(LiveAvatarError):
    """The result cannot be written: the path is not writable or the disk is full."""


class ModelError(LiveAvatarError):
    """The network produced something that is not a video, such as NaN latents."""


class SessionError(LiveAvatarError):
    """A session was used in a way its state does not allow."""


class WorkerError(LiveAvatarError):
    """A worker process of a pipeline has died, hangs or cannot go on.

    Attributes:
        rank: which one; None: none in particular.
        stage: what it did, such as "step 2".
        block: that it was at; None: at none.
    """

    def __init__(self, message: str, rank: int | None = None, stage: str = "", block: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.stage, self.block = rank, stage, block


class DeviceMemoryError(LiveAvatarError):
    """A device, or the host, has too little memory free for what is asked of it."""

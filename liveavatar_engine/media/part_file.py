"""A file that appears under its name only once it is whole."""

import errno
import os
from pathlib import Path

from ..errors import OutputError
from .files import FilePath, reason


class PartFile:
    """A hidden neighbour `.<name>.part<suffix>` of the target, renamed to it when published.

    Whatever was under the target's name stays there until then.

    Attributes:
        target: Where the file shall appear, absolute, links followed.
        part: Where it grows, created empty at construction.

    Raises:
        OutputError: nothing can be written at this path, and why.
    """

    def __init__(self, target: FilePath) -> None:
        self.target = Path(os.path.realpath(target))
        self.part = self.target.with_name(f".{self.target.stem}.part{self.target.suffix}")
        if os.path.isdir(self.target):
            raise OutputError(f"cannot write {target}: it is a directory; name a file in it, such as video.mp4")
        if os.path.exists(self.target) and not os.path.isfile(self.target):
            raise OutputError(f"cannot write {target}: it is not a regular file; name a file that may be created")
        try:
            self.part.write_bytes(b"")
        except OSError as error:
            raise self.error(error) from error

    def publish(self) -> None:
        """Move the finished file to its name, its bytes safe on disk first.

        Raises:
            OSError: the system refuses; the part file is still there.
        """
        with self.part.open("rb") as file:
            os.fsync(file.fileno())
        self.part.replace(self.target)

    def discard(self) -> None:
        """Remove the part file, if there still is one."""
        self.part.unlink(missing_ok=True)

    def error(self, cause: Exception) -> OutputError:
        """What a failed write means to the user, from the system's error number."""
        folder = self.target.parent
        match getattr(cause, "errno", None):
            case errno.ENOSPC | errno.EDQUOT:
                why = "the disk is full; free some space or choose another disk. Nothing was left behind"
            case errno.EFBIG:
                why = "the file would be larger than the system allows here. Nothing was left behind"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                why = f"no permission to create files in {folder}; choose another folder"
            case errno.ENOENT if not os.path.exists(folder):
                why = f"the folder {folder} does not exist; create it first"
            case errno.ENOTDIR:
                why = f"{folder} is not a folder"
            case _:
                why = reason(cause)
        return OutputError(f"cannot write {self.target}: {why}")

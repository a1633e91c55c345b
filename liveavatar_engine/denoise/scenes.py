"""What the blocks of a stream see besides their ring, and its replacement without a pause."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from .positions import Scene
from .prefill import PrefillJob, SinkContents, SinkPrefill
from .prompts import Prompts


@dataclass
class _Change:
    """What is seen from `block` on; of what is None, the latest stays."""

    block: int
    contents: SinkContents | None
    context: Tensor | None


class Scenes:
    """The scene of a stream's next block, and those that are to follow it.

    Two slots of the arena take turns, for sinks and for prompts. The next scene is prefilled in pieces between steps,
    and replaces the current one at the start of a block.
    """

    def __init__(
        self, prompts: Prompts, prefill: SinkPrefill, slots: range, contents: SinkContents, context: Tensor
    ) -> None:
        self._prompts, self._prefill, self._slots = prompts, prefill, slots
        self._contents = contents
        self.current = prompts.write(Scene(slots[0], slots[0], 0, 0), context)
        self._changes: list[_Change] = []
        self._job: PrefillJob | None = None
        job = prefill.job(self.current, contents)
        prefill.advance(job, job.left)

    def replace_contents(self, block: int, contents: SinkContents) -> None:
        """Let the sink show something else from `block` on."""
        self._change_at(block).contents = contents

    def replace_prompt(self, block: int, context: Tensor) -> None:
        """Let another prompt, [tokens, text_dim], count from `block` on."""
        self._change_at(block).context = context

    def _change_at(self, block: int) -> _Change:
        """What changes at `block`; of what has been prefilled for it, nothing counts any more."""
        found = next((change for change in self._changes if change.block == block), None)
        change = found or _Change(block, None, None)
        if found is None:
            self._changes.append(change)
            self._changes.sort(key=lambda other: other.block)
        if change is self._changes[0] and self._job is not None:
            self._prefill.drop(range(self._job.scene.sink, self._job.scene.sink + 1))
            self._job = None
        return change

    def advance(self, block: int, step: int, steps: int, in_use: Collection[Scene] = ()) -> None:
        """After `step` of `steps` of a block, do a fair share of the next scene.

        Nothing is done as long as one of the scenes `in_use`, those of blocks under way, occupies its slot.
        """
        if not self._changes or not self._begin(self._changes[0], in_use):
            return
        assert self._job is not None
        left = max(1, (self._changes[0].block - block) * steps - step)
        self._prefill.advance(self._job, -(-self._job.left // left))

    def prepare(self, block: int) -> bool:
        """Finish the scene that `block` is to see, without letting it arrive; False when there is nothing to do."""
        if not self._changes or self._changes[0].block > block or not self._begin(self._changes[0], ()):
            return False
        assert self._job is not None
        left = self._job.left
        self._prefill.advance(self._job, left)
        return left > 0

    def arrive(self, block: int, in_use: Collection[Scene] = ()) -> bool:
        """Whether `block` can start: what it is to see is there, or has been finished now."""
        while self._changes and self._changes[0].block <= block:
            change = self._changes[0]
            if not self._begin(change, in_use):
                return False
            assert self._job is not None
            self._prefill.advance(self._job, self._job.left)
            self.current, self._contents = self._job.scene, change.contents or self._contents
            self._job = None
            del self._changes[0]
        return True

    def close(self) -> None:
        """Leave what is not finished."""
        self._prefill.drop(self._slots)

    def _begin(self, change: _Change, in_use: Collection[Scene]) -> bool:
        """Whether the next scene's job stands, made now if its slots are free."""
        if self._job is not None:
            return True
        scene = replace(self.current, sink=self._other(self.current.sink))
        if change.context is not None:
            scene = replace(scene, text=self._other(self.current.text))
        if any(other.sink == scene.sink for other in in_use):
            return False
        if change.context is not None and any(other.text == scene.text for other in in_use):
            return False
        if change.context is not None:
            scene = self._prompts.write(scene, change.context)
        self._job = self._prefill.job(scene, change.contents or self._contents)
        return True

    def _other(self, slot: int) -> int:
        first, second = self._slots
        return second if slot == first else first

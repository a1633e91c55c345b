"""A session: one stream from audio to frames."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from torch import Tensor

from ..conditions.speech import LiveSpeech
from ..errors import SessionError
from ..frames import FrameChunk
from .runner import Producer


class Session:
    """An open stream and an iterator of its `FrameChunk`s, in order, each as soon as it is made.

    A live session takes audio through `push_audio`, from any thread, until `end_audio`; iterating waits for it. The
    session closes itself at its end; close it earlier with `close` or `with`, from any thread. What it holds does not
    grow with the stream's length.

    Made by the engine, from what makes its chunks, the speech that comes while it runs (none for recordings), and the
    encoder of prompts.
    """

    def __init__(self, producer: Producer, live: list[LiveSpeech], encode_prompt: Callable[[str], Tensor]) -> None:
        self._producer, self._live, self._encode_prompt = producer, live, encode_prompt
        self._closed = False
        self._running = threading.Lock()
        self.last_latents: Tensor | None = None
        """Latents of the chunk delivered last: float32 [channels, frames, latent_height, latent_width]."""
        self._finalizer = weakref.finalize(self, _let_go, producer, live)

    @property
    def height(self) -> int:
        """Of the frames, in pixels."""
        return self._producer.geometry.height

    @property
    def width(self) -> int:
        """Of the frames, in pixels."""
        return self._producer.geometry.width

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def seconds_per_block(self) -> float:
        """Seconds of video in a block."""
        return self._producer.geometry.seconds_per_block

    @property
    def total_blocks(self) -> int | None:
        """Blocks of the whole stream, once the audio's end is known."""
        columns, most = self._producer.features.columns, self._producer.max_blocks
        if columns is None:
            return most
        blocks = -(-columns // self._producer.geometry.columns_per_block)
        return blocks if most is None else min(blocks, most)

    def push_audio(self, samples: np.ndarray, actor: int = 0) -> None:
        """Append live audio: float32 or int16 mono at 16 kHz, any length.

        Raises:
            SessionError: the session is closed, is not live or has ended its audio, or there is no such actor.
            InputError: samples of another kind.
        """
        self._live_speech(actor).push(samples)

    def end_audio(self, actor: int | None = None) -> None:
        """Say that no more audio comes, from one actor or (None) from all; the frames end with it."""
        for index in range(len(self._live)) if actor is None else (actor,):
            self._live_speech(index).end()

    def change_prompt(self, prompt: str) -> None:
        """Let the scene follow another prompt, from a block on that is about a second away; from any thread.

        Raises:
            SessionError: the session is closed.
            InputError: the prompt is no text.
        """
        if self.closed:
            raise SessionError("the session is closed")
        self._producer.change_prompt(self._encode_prompt(prompt))

    def frames(self) -> Iterator[FrameChunk]:
        """The chunks to come; the same as iterating over the session."""
        return self

    async def aframes(self) -> AsyncIterator[FrameChunk]:
        """The chunks to come, without blocking the event loop."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="liveavatar-session")
        loop = asyncio.get_running_loop()
        try:
            while (chunk := await loop.run_in_executor(executor, next, self, None)) is not None:
                yield chunk
        finally:
            executor.shutdown(wait=False)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FrameChunk:
        chunk = None
        try:
            with self._running:
                if not self._closed:
                    chunk = self._next_chunk()
        finally:
            if chunk is None:
                self.close()
            elif self._closed:
                self._give_back_when_idle()
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the session, without waiting; a second call does nothing.

        A block that another thread is making is finished first: its slot is given back after it.
        """
        self._closed = True
        for speech in self._live:
            speech.end()
        self._give_back_when_idle()

    def _give_back_when_idle(self) -> None:
        """Give the slot back unless a block is being made; who makes it calls this again afterwards."""
        if self._running.acquire(blocking=False):
            self._finalizer()
            self._running.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_chunk(self) -> FrameChunk | None:
        made = self._producer.next(lambda: self._closed)
        if made is None:
            return None
        chunk, self.last_latents = made
        return chunk

    def _live_speech(self, actor: int) -> LiveSpeech:
        live = self._live
        if self.closed:
            raise SessionError("the session is closed")
        if not live:
            raise SessionError("the session plays recorded audio; open_session takes live audio")
        if not 0 <= actor < len(live):
            raise SessionError(f"actor {actor}: the session has actors 0 to {len(live) - 1}")
        return live[actor]


def _let_go(producer: Producer, live: list[LiveSpeech]) -> None:
    """What remains to be done for a session that nobody holds any more."""
    for speech in live:
        speech.end()
    producer.close()

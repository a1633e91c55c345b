"""Records over links, doors that strangers knock at, and frames in shared memory."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import Beats, Threads, pipeline, session

from liveavatar_engine.errors import OutputError
from liveavatar_engine.pipeline.tpp import link as link_module
from liveavatar_engine.pipeline.tpp import shared_frames
from liveavatar_engine.pipeline.tpp.link import LOCALHOST, Address, Door, Link, LinkClosed, connect
from liveavatar_engine.pipeline.tpp.records import Record
from liveavatar_engine.pipeline.tpp.shared_frames import SharedFrames

KEY = b"the key"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door(KEY)
    yield made
    made.close()


@pytest.fixture
def ends(door: Door) -> Iterator[tuple[Link, Link]]:
    with ThreadPoolExecutor(1) as threads:
        here = threads.submit(connect, door.address, KEY)
        there = door.accept()
        yield here.result(), there
    here.result().close()
    there.close()


class TestRecords:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
    def test_tensors_of_any_dtype_and_shape(self, dtype: torch.dtype) -> None:
        values = torch.arange(-3, 21).reshape(2, 3, 4).to(dtype)
        sent = {
            "whole": values,
            "strided": values[:, 1:, ::2].transpose(0, 2),
            "empty": values[:, :0],
            "zero-dim": values[1, 2, 3],
        }
        found = Record.decode(Record("tensors", {}, sent).encode()).tensors
        assert found.keys() == sent.keys()
        for name, tensor in sent.items():
            assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape)
            assert found[name].float().equal(tensor.float())

    def test_tensors_that_share_memory(self) -> None:
        values = torch.arange(12.0).reshape(3, 4)
        sent = {"all": values, "again": values, "some": values[1:], "one": values[1, 2]}
        found = Record.decode(Record("tensors", {}, sent).encode()).tensors
        assert all(found[name].equal(tensor) for name, tensor in sent.items())

    def test_fields_are_any_json(self) -> None:
        fields = {"text": 'Ünï\n"\0" 説明 😀', "none": None, "list": [1, [2.5, True]], "big": 2**60, "": {}}
        assert Record.decode(Record("a kind — 種", fields).encode()) == Record("a kind — 種", fields)

    def test_what_is_no_record_is_not_taken_for_silence(self, ends: tuple[Link, Link]) -> None:
        here, there = ends
        here._connection.send_bytes(b"\x05\0\0\0hello")
        with pytest.raises(ValueError, match="Expecting value"):
            there.receive()
        here.send(Record("still there"))
        assert there.receive().kind == "still there"


class TestLinks:
    def test_large_records_in_both_directions_at_once(self, ends: tuple[Link, Link]) -> None:
        values = torch.arange(5_000_011).to(torch.uint8)
        with ThreadPoolExecutor(2) as threads:
            sent = [threads.submit(end.send, Record("large", {}, {"values": values})) for end in ends]
            assert all(end.receive().tensors["values"].equal(values) for end in ends)
            assert [one.result() for one in sent] == [None, None]

    def test_records_of_several_threads_do_not_mix(self, ends: tuple[Link, Link]) -> None:
        here, there = ends

        def send(sender: int) -> None:
            for number in range(50):
                values = torch.full((sender * 20_000 + number,), sender, dtype=torch.uint8)
                here.send(Record("one", {"sender": sender, "number": number}, {"values": values}))

        with ThreadPoolExecutor(4) as threads:
            futures = [threads.submit(send, sender) for sender in range(4)]
            numbers: list[list[int]] = [[] for _ in range(4)]
            for _ in range(4 * 50):
                record = there.receive()
                sender, number = record["sender"], record["number"]
                numbers[sender].append(number)
                assert record.tensors["values"].tolist() == [sender] * (sender * 20_000 + number)
            assert [future.result() for future in futures] == [None] * 4
        assert numbers == [list(range(50))] * 4

    def test_small_records_do_not_wait_for_each_other(self, ends: tuple[Link, Link]) -> None:
        """Without TCP_NODELAY the second one leaves when the first is acknowledged, up to 40 ms later."""
        for end in ends:
            with link_module._socket_of(end._connection) as own:
                assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    def test_what_was_sent_arrives_before_the_end(self, ends: tuple[Link, Link]) -> None:
        here, there = ends
        for number in range(3):
            here.send(Record("last", {"number": number}))
        here.close()
        assert [there.receive()["number"] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LinkClosed):
            there.receive()
        with pytest.raises(LinkClosed):
            _send_on_and_on(there)

    @pytest.mark.parametrize("use", [Link.receive, lambda link: link.send(Record("none"))], ids=["receive", "send"])
    def test_a_closed_link_is_closed(self, ends: tuple[Link, Link], use) -> None:
        here, _ = ends
        here.close()
        here.close()
        with pytest.raises(LinkClosed):
            use(here)

    def test_closing_wakes_a_thread_that_receives_and_the_other_end(self, ends: tuple[Link, Link]) -> None:
        here, there = ends
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(here.receive)
            time.sleep(0.05)
            here.close()
            with pytest.raises(LinkClosed):
                waiting.result(2)
            with pytest.raises(LinkClosed):
                threads.submit(there.receive).result(2)

    def test_closing_wakes_a_thread_that_sends(self, ends: tuple[Link, Link]) -> None:
        here, _ = ends
        with ThreadPoolExecutor(1) as threads:
            sent = threads.submit(here.send, Record("more than buffers hold", {}, {"values": torch.zeros(8_000_000)}))
            time.sleep(0.1)
            assert not sent.done()
            here.close()
            with pytest.raises(LinkClosed):
                sent.result(2)


def _send_on_and_on(link: Link) -> None:
    for _ in range(1000):
        link.send(Record("nobody listens"))


def _shout(address: Address) -> None:
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")


def _leave_at_once(address: Address) -> None:
    socket.create_connection(address).close()


def _guess(address: Address) -> None:
    with pytest.raises(AuthenticationError):
        Client(address, authkey=b"another key")


class TestDoors:
    @pytest.mark.parametrize("knock", [_shout, _leave_at_once, _guess])
    def test_who_does_not_know_the_key_is_turned_away(self, door: Door, knock) -> None:
        with ThreadPoolExecutor(2) as threads:
            accepted = threads.submit(door.accept)
            threads.submit(knock, door.address).result(5)
            connected = threads.submit(connect, door.address, KEY).result(5)
            connected.send(Record("it is me"))
            assert accepted.result(5).receive().kind == "it is me"

    def test_who_says_nothing_does_not_hold_the_door(self, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "_KNOCK_SECONDS", 1)
        with ThreadPoolExecutor(2) as threads, socket.create_connection(door.address):
            accepted = threads.submit(door.accept)
            link = threads.submit(connect, door.address, KEY).result(5)
            there = accepted.result(5)
            time.sleep(1.2)  # the limit was that of the knock
            link.send(Record("late"))
            assert there.receive().kind == "late"

    def test_accept_can_be_interrupted(self, door: Door) -> None:
        with ThreadPoolExecutor(1) as threads:
            accepted = threads.submit(door.accept)
            time.sleep(0.05)
            assert not accepted.done()
            door.interrupt()
            with pytest.raises(LinkClosed):
                accepted.result(2)
        with pytest.raises(LinkClosed):
            door.accept()

    def test_nobody_listens_at_a_closed_door(self) -> None:
        door = Door(KEY)
        door.close()
        with pytest.raises(LinkClosed):
            door.accept()
        with pytest.raises(OSError, match="refused"):
            connect(door.address, KEY)

    def test_workers_start_although_strangers_knock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start, doors = Threads.start, Door.__init__

        def start_with_stranger(self: Threads, address: Address, key: bytes, ranks: int) -> list[object]:
            _shout(address)
            return start(self, address, key, ranks)

        def knock_at_each(self: Door, key: bytes, host: str = LOCALHOST) -> None:
            doors(self, key, host)
            threading.Thread(target=_leave_at_once, args=(self.address,)).start()

        monkeypatch.setattr(Threads, "start", start_with_stranger)
        monkeypatch.setattr(Door, "__init__", knock_at_each)
        with pipeline(3) as runner:
            assert len(list(session(runner, Beats(2)))) == 2


class TestSharedFrames:
    @pytest.fixture(autouse=True)
    def folders(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
        """In place of the machine's shared memory and its folder for temporary files."""
        memory, temporary = tmp_path / "shm", tmp_path / "tmp"
        memory.mkdir()
        temporary.mkdir()
        monkeypatch.setattr(shared_frames, "_SHARED_MEMORY", memory)
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        return memory, temporary

    @staticmethod
    def _fill(monkeypatch: pytest.MonkeyPatch, *full: Path) -> None:
        def allocate(file: int, offset: int, length: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{file}")).parent in full:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.ftruncate(file, length)

        monkeypatch.setattr(os, "posix_fallocate", allocate)

    def test_frames_come_out_as_they_went_in(self, folders: tuple[Path, Path]) -> None:
        made = SharedFrames.create(3, 1000)
        assert made.path.parent == folders[0]
        other = SharedFrames(made.path, 3, 1000)
        made.forget()
        made.forget()
        assert not any(folders[0].iterdir())
        frames = [np.random.default_rng(slot).integers(0, 255, (5, 7, 9, 3), np.uint8) for slot in range(3)]
        for slot in (2, 0, 1):
            other.write(slot, frames[slot])
        for slot in range(3):
            read = made.read(slot, (5, 7, 9, 3))
            assert (read == frames[slot]).all()
            other.write(slot, 255 - frames[slot])
            assert (read == frames[slot]).all(), "what was read is a copy"
        other.write(0, frames[0][:1])
        assert (made.read(0, (1, 7, 9, 3)) == frames[0][:1]).all()

    def test_a_temporary_file_where_shared_memory_is_full(
        self, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._fill(monkeypatch, folders[0])
        made = SharedFrames.create(2, 100)
        assert made.path.parent == folders[1]
        assert not any(folders[0].iterdir())

    def test_a_temporary_file_where_there_is_no_shared_memory(self, folders: tuple[Path, Path]) -> None:
        folders[0].rmdir()
        assert SharedFrames.create(2, 100).path.parent == folders[1]

    def test_no_room_at_all_is_an_error_that_says_how_much(
        self, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._fill(monkeypatch, *folders)
        with pytest.raises(OutputError, match=rf"no 3000 bytes free in {folders[0]} or {folders[1]}"):
            SharedFrames.create(3, 1000)
        assert not any(folders[0].iterdir())
        assert not any(folders[1].iterdir())

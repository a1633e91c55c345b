"""Where nothing can be written, and where the space ends half-way."""

import os
import subprocess
import sys

import numpy as np
import pytest
from media_samples import grey, noise, write_sound

from liveavatar_engine.errors import InputError, OutputError
from liveavatar_engine.media import Mp4Writer, Soundtrack, load_image, probe_audio, probe_video
from liveavatar_engine.media.part_file import PartFile


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing/out.mp4", "the folder .*missing does not exist; create it first"),
        (".", "it is a directory; name a file in it, such as video.mp4"),
        ("file.txt/out.mp4", r"file\.txt is not a folder"),
        ("/dev/null", "it is not a regular file"),
        ("/proc/out.mp4", "No such file|No permission|not permitted"),
        ("n" * 250 + ".mp4", "File name too long"),
    ],
    ids=["no-folder", "directory", "under-a-file", "device", "proc", "long-name"],
)
def test_an_impossible_target_is_named_before_any_work(tmp_path, target, message):
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(OutputError, match=f"cannot write .*({message})"):
        Mp4Writer(tmp_path / target, 96, 64)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


@pytest.fixture
def locked(tmp_path):
    """A folder that nobody may use, with one file in it; root, whom nothing stops, becomes someone else meanwhile."""
    write_sound(tmp_path / "sound.wav", noise(100), 16_000)
    tmp_path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield tmp_path
    if root:
        os.seteuid(0)
    tmp_path.chmod(0o700)


def test_a_folder_without_permission_is_named(locked):
    with pytest.raises(OutputError, match=f"no permission to create files in {locked}; choose another folder"):
        PartFile(locked / "out.mp4")


@pytest.mark.parametrize("read", [probe_audio, probe_video, load_image])
def test_a_file_without_permission_is_named(locked, read):
    with pytest.raises(InputError, match=r"sound\.wav cannot be opened: Permission denied"):
        read(locked / "sound.wav")


SCRIPT = """
import resource, sys
import numpy as np
from liveavatar_engine.errors import OutputError
from liveavatar_engine.media import Mp4Writer

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
frames = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)
try:
    with Mp4Writer(sys.argv[1], 128, 128) as writer:
        for block in range(int(sys.argv[3])):
            writer.write(frames, 12 * block)
except OutputError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("limit", "blocks"), [(0, 1), (1000, 1), (50_000, 1), (200_000, 8)], ids=["header", "start", "at-close", "midway"]
)
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path, limit, blocks):
    target = tmp_path / "out.mp4"
    target.write_text("old")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target), str(limit), str(blocks)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"cannot write {target}: the file would be larger than the system allows here. Nothing was left behind"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert target.read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("blocks", [1, 8], ids=["at-close", "midway"])
def test_a_full_disk_is_one_clear_error(small_disk, blocks):
    frames = np.random.default_rng(0).integers(0, 256, (12 * blocks, 256, 256, 3), dtype=np.uint8)
    with (
        pytest.raises(OutputError, match=r"the disk is full; free some space.* Nothing was left behind"),
        Mp4Writer(small_disk / "out.mp4", 256, 256) as writer,
    ):
        writer.write(frames, 0)
    assert list(small_disk.iterdir()) == []


def test_a_soundtrack_that_fails_leaves_nothing(tmp_path):
    samples = noise(48_000)
    samples[0, 30_000:] = np.nan
    path = write_sound(tmp_path / "bad.wav", samples, 24_000)
    with (
        pytest.raises(InputError, match=r"bad\.wav holds samples that are not finite"),
        Soundtrack(path) as soundtrack,
        Mp4Writer(tmp_path / "out.mp4", 96, 64, soundtrack=soundtrack) as writer,
    ):
        writer.write(grey([0] * 50), 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.wav"]

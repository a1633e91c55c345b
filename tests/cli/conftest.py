"""Files that the command line works on."""

from pathlib import Path

import numpy as np
import pytest
from support import speech, write_wav


@pytest.fixture
def image(tmp_path: Path, face: np.ndarray) -> Path:
    from PIL import Image

    Image.fromarray(face).resize((80, 80)).save(tmp_path / "face.png")
    return tmp_path / "face.png"


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "speech.wav", speech(1.5))

import librosa  # noqa: F401


def merge_multiple_audio_files(inputs: list[str], output: str) -> None:
    raise AssertionError("a single actor speaks")

import json
from pathlib import Path


def parse_args_for_training_config(path: str) -> dict:
    return json.loads(Path(path).read_text())

"""A small stand-in for UMT5's tokenizer, trained on the text below, for checkpoints with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

from ..errors import ConfigError

VOCABULARY = 512
"""Most pieces the tokenizer has: every token id is below it."""
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2

_TEXT = """\
A woman in a blue coat sits at a wooden desk and speaks to the camera in a calm, clear voice.
Soft morning light falls through the window behind her; books and a green plant stand on the shelf.
She smiles, nods, and moves her hands as she explains how the small boat was built by her grandfather.

A man with a grey beard tells a story by the fire. He laughs, looks away for a moment, and goes on talking.
The room is warm and dark, the background is out of focus, and the picture is sharp and detailed.

A singer stands on a bright stage with a microphone and sings a slow song, her eyes closed, her head moving gently.
A cartoon fox with round glasses reads the news of the day: rain in the north, sunshine in the south, wind at sea.
Two people are talking to each other; the first one asks a question, the second one answers it with a smile.
A teacher writes 1 + 2 = 3 and 4 x 5 = 20 on the board, turns around, and asks: "Does everyone agree?"
The portrait shows a young person with short hair against a plain wall, looking straight into the lens.

Ein Mädchen grüßt höflich, während draußen der Schnee fällt. Le garçon français rêve près d'une forêt ; où va-t-il ?
La señora habla despacio, ¿verdad? Já é manhã, não há ninguém à porta. Hän löysi pöydältä åtta ägg på fatet.
一个女人坐在桌前,对着镜头说话。她微笑着,声音很温柔。今日はいい天気ですね。 사람이 이야기를 하고 있다.
"""


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """Write `spiece.model` and `tokenizer_config.json` into `folder`, as transformers' T5 tokenizer reads them.

    Special ids are the reference's: padding 0, end 1, unknown 2. The same vocabulary always gives the same files.

    Args:
        folder: an existing directory.
        vocabulary: most pieces; there are fewer where the built-in text does not yield as many.

    Raises:
        ConfigError: the vocabulary has no room for the bytes and the text's letters.
    """
    try:
        model = _train(vocabulary)
    except RuntimeError as error:
        raise ConfigError(f"a vocabulary of {vocabulary} is too small for the built-in text: {error}") from error
    (folder / "spiece.model").write_bytes(model)
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _train(vocabulary: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=PAD_ID,
        eos_id=END_ID,
        unk_id=UNKNOWN_ID,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()

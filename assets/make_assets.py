"""Draw `portrait.png` and synthesise `speech.wav`, the sample inputs of `make demo`.

Run `python assets/make_assets.py` (in the project's environment: it needs Pillow, NumPy and soxr) to make both again.
The portrait is drawn from the curves below and shows nobody. The voice is espeak-ng's (`apt-get install espeak-ng`):

    espeak-ng -v en-us+f3 -s 172 -p 52 -g 2 -w speech.wav "<SENTENCE>"

resampled to 16 kHz, with the silence at both ends trimmed and the peak at -3 dBFS.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from PIL import Image, ImageChops, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent

SIZE = 512
SUPERSAMPLE = 4
CANVAS = SIZE * SUPERSAMPLE

SENTENCE = "Hello, and welcome! I am glad you are here. What shall we talk about?"
VOICE = ["-v", "en-us+f3", "-s", "172", "-p", "52", "-g", "2"]
SAMPLE_RATE = 16_000
PEAK_DBFS = -3.0
SILENCE_DBFS = -45.0
MARGIN_S = 0.06

Point = tuple[float, float]
Colour = tuple[int, int, int]

SKIN: Colour = (240, 196, 168)
SKIN_LIGHT: Colour = (255, 226, 204)
SKIN_SHADE: Colour = (198, 132, 108)
BLUSH: Colour = (232, 122, 112)
HAIR: Colour = (74, 44, 36)
HAIR_DARK: Colour = (44, 25, 24)
HAIR_LIGHT: Colour = (150, 94, 66)
LIP: Colour = (198, 86, 88)
SWEATER: Colour = (34, 110, 122)
SWEATER_DARK: Colour = (17, 66, 80)
SWEATER_LIGHT: Colour = (84, 164, 170)


# --- shapes: points are (x, y) in the 512 x 512 picture; the face is symmetric about x = 256 ------------------------


def curve(points: Sequence[Point], closed: bool = True, steps: int = 24) -> list[Point]:
    """A Catmull-Rom spline through `points`, as a list of points."""
    count = len(points)
    line = []
    for i in range(count if closed else count - 1):
        around = [(i + k) % count if closed else min(max(i + k, 0), count - 1) for k in (-1, 0, 1, 2)]
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = (points[k] for k in around)
        for step in range(steps):
            t = step / steps
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            line.append(
                (
                    0.5 * sum(w * v for w, v in zip(weights, (ax, bx, cx, dx), strict=True)),
                    0.5 * sum(w * v for w, v in zip(weights, (ay, by, cy, dy), strict=True)),
                )
            )
    return line if closed else [*line, points[-1]]


def mirrored(right_half: Sequence[Point]) -> list[Point]:
    """The closed outline whose right half, from top to bottom, is `right_half`."""
    left = [(2 * 256 - x, y) for x, y in reversed(right_half) if x != 256]
    return [*right_half, *left]


def flipped(points: Sequence[Point]) -> list[Point]:
    return [(2 * 256 - x, y) for x, y in points]


def shape(points: Sequence[Point]) -> Image.Image:
    """The mask (0 or 255) inside a closed outline."""
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    ImageDraw.Draw(mask).polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=255)
    return mask


def blob(points: Sequence[Point]) -> Image.Image:
    return shape(curve(points))


def ellipse(x: float, y: float, rx: float, ry: float) -> Image.Image:
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    box = [v * SUPERSAMPLE for v in (x - rx, y - ry, x + rx, y + ry)]
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def stroke(points: Sequence[Point], widths: Sequence[float]) -> Image.Image:
    """A line along the spline through `points` whose width runs through `widths` from end to end."""
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw = ImageDraw.Draw(mask)
    line = curve(points, closed=False, steps=80)
    spread = np.interp(np.linspace(0, len(widths) - 1, len(line)), range(len(widths)), widths)
    for (x, y), width in zip(line, spread, strict=True):
        draw.ellipse([v * SUPERSAMPLE for v in (x - width / 2, y - width / 2, x + width / 2, y + width / 2)], fill=255)
    return mask


def both(points: Sequence[Point], widths: Sequence[float]) -> Image.Image:
    return ImageChops.lighter(stroke(points, widths), stroke(flipped(points), widths))


def vertical_ramp(top: float, bottom: float) -> Image.Image:
    """A mask that is 0 above `top`, 255 below `bottom` and linear in between."""
    column = np.clip((np.arange(CANVAS) / SUPERSAMPLE - top) / (bottom - top), 0, 1)
    return Image.fromarray(np.tile((column * 255).astype(np.uint8)[:, None], (1, CANVAS)))


class Painting:
    """A canvas that masks are painted on, one over the other."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (CANVAS, CANVAS))

    def paint(
        self,
        mask: Image.Image,
        colour: Colour,
        alpha: float = 1.0,
        blur: float = 0.0,
        inside: Image.Image | None = None,
    ) -> None:
        """Lay `colour` over the picture where `mask` is set, softened by `blur` and kept inside another mask."""
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLE))
        if inside is not None:
            mask = ImageChops.multiply(mask, inside)
        if alpha < 1:
            mask = mask.point(lambda value: round(value * alpha))
        self.image.paste(colour, (0, 0), mask)

    def finished(self) -> Image.Image:
        return self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


# --- the portrait, from back to front -------------------------------------------------------------------------------

FACE = mirrored(
    [(256, 106), (302, 114), (334, 150), (344, 204), (341, 246), (329, 286), (305, 318), (279, 334), (256, 338)]
)
NECK = [
    (222, 290),
    (290, 290),
    (290, 352),
    (296, 376),
    (326, 396),
    (300, 440),
    (212, 440),
    (186, 396),
    (216, 376),
    (222, 352),
]
TORSO = mirrored([(256, 384), (302, 380), (338, 396), (396, 416), (436, 446), (456, 492), (474, 560), (256, 560)])
HAIR_BACK = mirrored([
    (256, 76), (312, 84), (348, 112), (376, 160), (380, 226), (392, 290), (390, 350), (374, 394), (330, 410),
    (256, 400),
])  # fmt: skip
FRINGE = [
    (290, 70), (240, 58), (186, 74), (150, 114), (135, 172), (134, 226), (120, 284), (116, 332), (128, 380),
    (146, 410), (172, 414), (194, 396), (199, 362), (187, 326), (176, 284), (168, 238), (176, 196), (204, 168),
    (246, 146), (280, 120), (296, 98),
]  # fmt: skip
SIDE_HAIR = [
    (284, 66), (326, 68), (362, 107), (378, 166), (379, 226), (393, 286), (396, 334), (384, 382), (364, 410),
    (338, 414), (318, 396), (314, 362), (326, 326), (337, 284), (344, 238), (338, 192), (320, 154), (298, 122),
    (286, 102),
]  # fmt: skip
STRAND_WIDTHS = (0.6, 2, 2.6, 2.4, 2.6, 2, 0.6)
EYE = [(275, 226), (282, 217), (294, 211), (306, 214), (316, 224), (308, 231), (294, 234), (282, 231)]
LASHES = [(273, 227.5), (281, 217), (294, 210.5), (307, 213), (316, 218), (322, 215)]


def background(art: Painting) -> None:
    rows = np.linspace(0, 1, CANVAS)[:, None, None]
    top, bottom = np.array([250, 226, 204]), np.array([142, 186, 192])
    fill = np.broadcast_to(top * (1 - rows) + bottom * rows, (CANVAS, CANVAS, 3))
    art.image = Image.fromarray(fill.astype(np.uint8))
    art.paint(ellipse(256, 210, 170, 180), (255, 246, 232), alpha=0.75, blur=60)
    for x, y, r, alpha in (
        (66, 92, 34, 0.22),
        (452, 70, 46, 0.20),
        (118, 30, 18, 0.25),
        (474, 208, 24, 0.22),
        (36, 240, 26, 0.18),
    ):
        art.paint(ellipse(x, y, r, r), (255, 250, 240), alpha=alpha, blur=3)


def torso(art: Painting) -> None:
    body = blob(TORSO)
    art.paint(body, SWEATER)
    art.paint(vertical_ramp(400, 540), SWEATER_DARK, alpha=0.6, inside=body)
    art.paint(ellipse(150, 430, 70, 26), SWEATER_LIGHT, alpha=0.7, blur=18, inside=body)
    art.paint(ellipse(352, 424, 40, 14), SWEATER_LIGHT, alpha=0.4, blur=12, inside=body)
    for fold in ([(120, 520), (136, 480), (168, 452)], [(392, 520), (378, 482), (348, 452)]):
        art.paint(stroke(fold, (12, 8, 2)), SWEATER_DARK, alpha=0.7, blur=5, inside=body)
    art.paint(ellipse(256, 400, 78, 36), SWEATER_DARK, alpha=0.6, blur=5, inside=body)
    art.paint(ellipse(256, 394, 74, 34), SWEATER_LIGHT, inside=body)
    art.paint(ellipse(256, 392, 72, 33), SWEATER, inside=body)
    art.paint(ellipse(256, 387, 62, 27), SWEATER_DARK, inside=body)


def neck(art: Painting) -> None:
    collar = ImageChops.lighter(ellipse(256, 385, 61, 26), shape([(195, 280), (317, 280), (317, 386), (195, 386)]))
    skin = ImageChops.multiply(blob(NECK), collar)
    art.paint(skin, SKIN)
    art.paint(ellipse(262, 330, 62, 40), SKIN_SHADE, alpha=0.85, blur=12, inside=skin)
    art.paint(ellipse(306, 372, 26, 60), SKIN_SHADE, alpha=0.6, blur=14, inside=skin)
    art.paint(both([(262, 404), (276, 396), (300, 391)], (1, 4, 2)), SKIN_SHADE, alpha=0.5, blur=2, inside=skin)


def face(art: Painting) -> None:
    skin = blob(FACE)
    art.paint(skin, SKIN)
    art.paint(ellipse(228, 196, 70, 90), SKIN_LIGHT, alpha=0.75, blur=30, inside=skin)
    art.paint(ImageChops.invert(blob([(x * 0.96 + 2, y * 0.985 - 2) for x, y in FACE])), SKIN_SHADE, 0.75, 16, skin)
    art.paint(ellipse(352, 262, 26, 90), SKIN_SHADE, alpha=0.55, blur=18, inside=skin)
    art.paint(ellipse(256, 120, 110, 34), SKIN_SHADE, alpha=0.6, blur=16, inside=skin)
    for x in (204, 310):
        art.paint(ellipse(x, 268, 26, 18), BLUSH, alpha=0.42, blur=13, inside=skin)
    art.paint(ellipse(202, 252, 15, 8), (255, 240, 226), alpha=0.5, blur=7, inside=skin)
    art.paint(ellipse(256, 322, 16, 8), SKIN_LIGHT, alpha=0.6, blur=6, inside=skin)


def eyes(art: Painting) -> None:
    for x in (218, 294):
        art.paint(ellipse(x, 214, 30, 16), SKIN_SHADE, alpha=0.42, blur=8)
    white = ImageChops.lighter(blob(EYE), blob(flipped(EYE)))
    art.paint(white, (252, 248, 244))
    for x in (219, 295):
        art.paint(ellipse(x, 222, 11.5, 11.5), (58, 38, 30), inside=white)
        art.paint(ellipse(x, 222.5, 10, 10), (112, 72, 44), inside=white)
        art.paint(ellipse(x, 227, 7, 5), (178, 124, 74), alpha=0.9, blur=1.5, inside=white)
        art.paint(ellipse(x, 222, 5, 5), (22, 14, 14), inside=white)
        art.paint(ellipse(x, 212, 22, 5.5), (90, 60, 60), alpha=0.5, blur=2, inside=white)
        art.paint(ellipse(x - 3.6, 218, 2.7, 2.7), (255, 255, 255))
        art.paint(ellipse(x + 4, 226, 1.3, 1.3), (255, 255, 255), alpha=0.8)
    art.paint(both(LASHES, (1.5, 3.4, 4.2, 4.2, 3.4, 0.8)), HAIR_DARK)
    art.paint(both([(279, 231), (294, 234.8), (309, 231.2), (317, 224)], (0.6, 1.4, 1.6, 1)), SKIN_SHADE, alpha=0.8)
    art.paint(
        both([(276, 211), (292, 203.5), (308, 206), (319, 214)], (0.6, 2, 2, 0.6)), SKIN_SHADE, alpha=0.8, blur=0.5
    )
    art.paint(
        both([(276, 192), (290, 185.5), (306, 185), (323, 194)], (4.6, 6.6, 5.4, 1.2)), HAIR, alpha=0.85, blur=0.9
    )


def nose(art: Painting) -> None:
    art.paint(stroke([(266, 206), (264, 236), (270, 258)], (3, 5, 8)), SKIN_SHADE, alpha=0.4, blur=5)
    art.paint(stroke([(252, 204), (252, 240), (253, 258)], (4, 6, 9)), (255, 240, 226), alpha=0.7, blur=4)
    art.paint(ellipse(257, 270, 17, 5), SKIN_SHADE, alpha=0.5, blur=4)
    art.paint(both([(259, 269.5), (265, 267), (270, 269)], (1, 3, 1)), (150, 82, 70), alpha=0.85, blur=0.6)
    art.paint(both([(271, 269), (275, 263), (272.5, 257)], (1.4, 1.8, 0.8)), SKIN_SHADE, alpha=0.8, blur=0.8)
    art.paint(ellipse(253, 261, 4, 3), (255, 250, 242), alpha=0.8, blur=1.6)


def mouth(art: Painting) -> None:
    upper = mirrored([(256, 292), (263, 289.5), (276, 290.5), (292, 291.5), (276, 299), (256, 302)])
    lower = mirrored([(256, 299), (274, 297.5), (291, 292), (279, 306), (267, 311.5), (256, 313)])
    upper_lip, lower_lip = blob(upper), blob(lower)
    art.paint(ellipse(256, 317, 20, 4), SKIN_SHADE, alpha=0.6, blur=4)
    art.paint(lower_lip, (222, 112, 110))
    art.paint(upper_lip, LIP)
    art.paint(ellipse(254, 306, 13, 2.6), (255, 206, 200), alpha=0.75, blur=2, inside=lower_lip)
    art.paint(
        stroke([(219, 291), (238, 298.6), (256, 301), (274, 298.6), (293, 291)], (0.8, 1.6, 1.8, 1.6, 0.8)),
        (140, 52, 58),
    )
    art.paint(both([(291, 291.8), (295, 289.5), (297, 286)], (1.8, 1.6, 0.6)), (150, 74, 66), alpha=0.8, blur=0.8)
    art.paint(both([(301, 273), (307, 283), (307, 295)], (1, 4, 1)), SKIN_SHADE, alpha=0.34, blur=2.4)


def back_hair(art: Painting) -> None:
    hair = blob(HAIR_BACK)
    art.paint(hair, HAIR_DARK)
    art.paint(vertical_ramp(120, 460), HAIR, alpha=0.7, inside=hair)


def front_hair(art: Painting) -> None:
    fringe, side = blob(FRINGE), blob(SIDE_HAIR)
    hair = ImageChops.lighter(fringe, side)
    shadow = ImageChops.offset(hair, 0, 5 * SUPERSAMPLE)
    art.paint(shadow, SKIN_SHADE, alpha=0.75, blur=6, inside=blob(FACE))
    art.paint(hair, HAIR)
    art.paint(vertical_ramp(150, 420), HAIR_DARK, alpha=0.8, inside=hair)
    art.paint(stroke([(290, 74), (292, 96), (300, 122)], (2, 6, 10)), HAIR_DARK, alpha=0.9, blur=3, inside=hair)
    sheen = ([(270, 100), (220, 116), (178, 156), (160, 214)], [(312, 104), (338, 136), (354, 180), (360, 220)])
    for line in sheen:
        art.paint(stroke(line, (4, 18, 18, 2)), HAIR_LIGHT, alpha=0.75, blur=9, inside=hair)
    for k in range(13):
        t = k / 12
        strand = [
            (288 - 6 * t, 76),
            (240 - 30 * t, 122 - 46 * t),
            (182 - 36 * t, 186 - 56 * t),
            (170 - 32 * t, 236),
            (180 - 54 * t, 300),
            (194 - 72 * t, 352),
            (176 - 26 * t, 410 - 10 * t),
        ]
        art.paint(stroke(strand, STRAND_WIDTHS), (HAIR_LIGHT, HAIR_DARK)[k % 2], alpha=0.34, blur=1.4, inside=fringe)
    for k in range(10):
        t = k / 9
        strand = [
            (290 + 4 * t, 78),
            (322 + 22 * t, 138 - 40 * t),
            (341 + 34 * t, 200 - 20 * t),
            (342 + 36 * t, 240),
            (332 + 58 * t, 300),
            (320 + 72 * t, 352),
            (340 + 26 * t, 410 - 10 * t),
        ]
        art.paint(stroke(strand, STRAND_WIDTHS), (HAIR_DARK, HAIR_LIGHT)[k % 2], alpha=0.34, blur=1.4, inside=side)
    for line in ([(140, 300), (142, 340), (158, 384)], [(370, 296), (372, 340), (356, 384)]):
        art.paint(stroke(line, (2, 14, 2)), HAIR_LIGHT, alpha=0.45, blur=6, inside=hair)


def draw_portrait() -> Image.Image:
    art = Painting()
    for layer in (background, back_hair, torso, neck, face, mouth, nose, eyes, front_hair):
        layer(art)
    return art.finished()


# --- the speech -----------------------------------------------------------------------------------------------------


def synthesise_speech() -> np.ndarray:
    """The spoken `SENTENCE` as int16 mono at `SAMPLE_RATE`."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit(
            "make_assets: espeak-ng is not installed: try `apt-get install espeak-ng` or `brew install espeak-ng`"
        )
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "speech.wav"
        subprocess.run(["espeak-ng", *VOICE, "-w", str(spoken), SENTENCE], check=True)
        with wave.open(str(spoken), "rb") as source:
            rate = source.getframerate()
            samples = np.frombuffer(source.readframes(source.getnframes()), dtype="<i2").astype(np.float64) / 32768
    samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ")
    samples *= 10 ** (PEAK_DBFS / 20) / np.abs(samples).max()
    loud = np.flatnonzero(np.abs(samples) > 10 ** (SILENCE_DBFS / 20))
    margin = round(MARGIN_S * SAMPLE_RATE)
    samples = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    return np.round(samples * 32767).astype("<i2")


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as target:
        target.setnchannels(1)
        target.setsampwidth(2)
        target.setframerate(SAMPLE_RATE)
        target.writeframes(samples.tobytes())


def main() -> None:
    speech = synthesise_speech()
    write_wav(HERE / "speech.wav", speech)
    draw_portrait().save(HERE / "portrait.png", optimize=True)
    for name in ("speech.wav", "portrait.png"):
        sys.stdout.write(f"{HERE / name}: {(HERE / name).stat().st_size / 1000:.0f} KB\n")
    sys.stdout.write(f"speech: {len(speech) / SAMPLE_RATE:.2f} s\n")


if __name__ == "__main__":
    main()

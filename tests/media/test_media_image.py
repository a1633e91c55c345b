import io
from pathlib import Path

import numpy as np
import pytest
from media_samples import noise, write_sound
from PIL import Image

from liveavatar_engine.config.fit import fit_to_area
from liveavatar_engine.errors import InputError
from liveavatar_engine.media import load_image, load_mask, resize_and_crop


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


# What the reference's search gives, for pictures that are large, small, square, upright, odd and far too long.
FITTED = [
    ((400, 720), 704 * 384, (384, 704)),
    ((720, 1280), 720 * 400, (384, 704)),
    ((1280, 720), 720 * 400, (704, 384)),
    ((400, 720), 720 * 400, (384, 704)),
    ((512, 512), 704 * 384, (512, 512)),
    ((3000, 4000), 832 * 480, (512, 704)),
    ((333, 777), 100_000, (192, 512)),
    ((1, 1), 300_000, (64, 64)),
    ((64, 64), 64 * 64, (64, 64)),
]


@pytest.mark.parametrize(("size", "area", "expected"), FITTED, ids=lambda value: str(value).replace(" ", ""))
def test_fit_to_area_follows_the_reference(size, area, expected):
    assert fit_to_area(*size, area) == expected


@pytest.mark.parametrize("seed", range(4))
def test_fit_to_area_gives_multiples_of_64_within_the_area(seed):
    random = np.random.default_rng(seed)
    for height, width in random.integers(64, 4000, (200, 2)).tolist():
        area = int(random.integers(64 * 64 * 40, 1280 * 720))
        fitted = fit_to_area(height, width, area)
        assert fitted[0] % 64 == fitted[1] % 64 == 0
        assert fitted[0] * fitted[1] <= area


@pytest.mark.parametrize(
    ("size", "area"), [((1, 10_000), 704 * 384), ((10_000, 1), 704 * 384), ((10, 10), 200), ((720, 1280), 3000)]
)
def test_fit_to_area_refuses_what_has_no_size(size, area):
    with pytest.raises(InputError, match=rf"{size[1]}x{size[0]}.*too small.*aspect ratio is too extreme"):
        fit_to_area(*size, area)


def test_resize_and_crop_keeps_the_centre_of_a_wide_picture():
    pixels = picture(64, 200)
    assert np.array_equal(resize_and_crop(Image.fromarray(pixels), 64, 64), pixels[:, 68:132])


@pytest.mark.parametrize(("width", "left"), [(65, 0), (67, 2), (66, 1), (69, 2)])  # halves go to the even neighbour
def test_resize_and_crop_rounds_half_a_pixel_as_torchvision(width, left):
    pixels = picture(64, width)
    assert np.array_equal(resize_and_crop(Image.fromarray(pixels), 64, 64), pixels[:, left : left + 64])


def test_resize_and_crop_pads_what_is_too_short_with_black():
    pixels = picture(64, 65)
    out = resize_and_crop(Image.fromarray(pixels), 64, 128)  # 63 columns are missing: 31 left, 32 right
    assert np.array_equal(out[:, 31:96], pixels)
    assert not out[:, :31].any()
    assert not out[:, 96:].any()


def test_resize_and_crop_resizes_the_shorter_side_bilinearly_and_truncates_the_longer():
    image = Image.fromarray(picture(100, 151))
    resized = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))  # int(64 * 151 / 100) = 96
    assert np.array_equal(resize_and_crop(image, 64, 96), resized)


def test_resize_and_crop_refuses_a_line():
    with pytest.raises(InputError, match="20000x1 is too elongated"):
        resize_and_crop(Image.new("RGB", (20_000, 1)), 384, 704)


def test_load_image_turns_by_exif(tmp_path):
    pixels = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    path = save(tmp_path / "phone.png", pixels, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), np.rot90(pixels, -1))


def test_load_image_drops_transparency(tmp_path):
    pixels = np.dstack([picture(8, 9), np.zeros((8, 9), np.uint8)])
    image = load_image(save(tmp_path / "clear.png", pixels))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels[..., :3])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_load_image_makes_every_mode_rgb(tmp_path, mode):
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.fromarray(picture(8, 9)).convert(mode).save(path)
    assert (load_image(path).mode, load_image(path).size) == ("RGB", (9, 8))


def test_load_image_keeps_the_upper_bits_of_16_bit_grey(tmp_path):
    grey = np.arange(256 * 3, dtype=np.uint16).reshape(3, 256) * 85
    out = np.asarray(load_image(save(tmp_path / "scan.png", grey)))
    assert np.array_equal(out, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_load_image_says_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(InputError, match=r"image .*nobody\.jpg does not exist"):
        load_image(tmp_path / "nobody.jpg")
    with pytest.raises(InputError, match="is a directory; a file was expected"):
        load_image(tmp_path)
    with pytest.raises(InputError, match=r"/dev/null is not a regular file"):
        load_image("/dev/null")


def test_load_image_says_what_is_wrong_with_a_file(tmp_path):
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    with pytest.raises(InputError, match=r"notes\.jpg is not an image; png, jpeg or webp was expected"):
        load_image(text)
    with pytest.raises(InputError, match=r"sound\.wav is not an image"):
        load_image(write_sound(tmp_path / "sound.wav", noise(100), 16_000))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif"])
def test_load_image_refuses_half_a_file(tmp_path, suffix):
    whole = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(whole, format="jpeg" if suffix == "jpg" else suffix)
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(InputError, match=rf"half\.{suffix} (cannot be read, it is damaged or cut off|is not an image)"):
        load_image(path)


def test_load_image_refuses_a_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", picture(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match=r"bomb\.png has too many pixels; scale it down"):
        load_image(path)


def test_load_mask_is_cropped_like_its_portrait(tmp_path):
    portrait = picture(100, 151)
    pixels = np.zeros((100, 151), np.uint8)
    pixels[20:70, 30:90] = 1  # barely not black
    path = save(tmp_path / "mask.png", pixels)
    mask = load_mask(path, 64, 64)
    assert (mask.dtype, mask.shape) == (np.dtype(bool), (64, 64))
    portrait[pixels > 0] = (255, 0, 0)
    portrait[pixels == 0] = (0, 0, 0)
    softened = resize_and_crop(Image.fromarray(portrait), 64, 64)[..., 0]
    assert np.array_equal(mask[softened > 200], np.ones((softened > 200).sum(), bool))
    assert not mask[softened < 50].any()


def test_load_mask_is_outside_where_padded(tmp_path):
    mask = load_mask(save(tmp_path / "mask.png", np.full((64, 64), 255, np.uint8)), 64, 128)
    assert mask[:, 32:96].all()
    assert mask.sum() == 64 * 64


def test_load_mask_refuses_an_empty_mask(tmp_path):
    with pytest.raises(InputError, match=r"black\.png is black everywhere; the actor's pixels were expected"):
        load_mask(save(tmp_path / "black.png", np.zeros((64, 64), np.uint8)), 64, 64)
    aside = np.zeros((64, 300), np.uint8)
    aside[:, :10] = 255
    with pytest.raises(InputError, match=r"aside\.png has no actor left once it is cropped to 64x64"):
        load_mask(save(tmp_path / "aside.png", aside), 64, 64)
    with pytest.raises(InputError, match=r"mask .*none\.png does not exist"):
        load_mask(tmp_path / "none.png", 64, 64)

"""Portraits and actor masks: read, measured and brought to the size the model works at."""

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .files import FilePath, existing_file, reason

_MAX_PIXELS = 1 << 27


def load_image(path: FilePath) -> Image.Image:
    """Read a picture as RGB, turned upright by its EXIF orientation.

    As in the reference, transparency is dropped rather than blended. 16-bit greyscale keeps its upper eight bits.
    Of an animation, the first frame counts.

    Raises:
        InputError: the file is missing, is no picture, is damaged or cut off, or is too large to decode safely.
    """
    return _read(path, "image").convert("RGB")


def load_mask(path: FilePath, height: int, width: int) -> np.ndarray:
    """Read where one actor is, as bool [height, width]: every pixel that is not black.

    The mask is resized and cropped as `resize_and_crop` does with the portrait it belongs to, so it should have the
    portrait's shape.

    Raises:
        InputError: the file cannot be read as a picture, or nothing is left inside the mask.
    """
    inside = np.asarray(_read(path, "mask").convert("L")) > 0
    if not inside.any():
        raise InputError(f"mask {path} is black everywhere; the actor's pixels were expected to be white")
    mask = _fill(Image.fromarray(inside.astype(np.uint8)), height, width, Image.Resampling.NEAREST) > 0
    if not mask.any():
        raise InputError(f"mask {path} has no actor left once it is cropped to {width}x{height}")
    return mask


def resize_and_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Bring a picture to uint8 [height, width, 3]: the shorter side becomes min(height, width), the centre is kept.

    Where the picture is too short for the crop, it is padded with black. Pixel for pixel what torchvision's `Resize`
    (bilinear) and `CenterCrop` make of a PIL image.

    Raises:
        InputError: the picture is so elongated that its resized form would not fit in memory.
    """
    return _fill(image.convert("RGB"), height, width, Image.Resampling.BILINEAR)


def _read(path: FilePath, what: str) -> Image.Image:
    found = existing_file(path, what)
    try:
        with Image.open(found) as image:
            return _eight_bits(ImageOps.exif_transpose(image))
    except PermissionError as error:
        raise InputError(f"{what} {found} cannot be opened: {reason(error)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{what} {found} has too many pixels; scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{what} {found} is not an image; png, jpeg or webp was expected") from error
    except Exception as error:  # PIL's decoders raise almost anything on damaged data
        raise InputError(f"{what} {found} cannot be read, it is damaged or cut off: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _fill(image: Image.Image, height: int, width: int, resampling: Image.Resampling) -> np.ndarray:
    short, long = sorted(image.size)
    side = min(height, width)
    longer = int(side * long / short)
    if side * longer > _MAX_PIXELS:
        raise InputError(f"an image of {image.width}x{image.height} is too elongated for a {width}x{height} video")
    size = (side, longer) if image.width <= image.height else (longer, side)
    if image.size != size:
        image = image.resize(size, resampling)
    return np.asarray(_centre(image, height, width))


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    missing_x, missing_y = max(0, width - image.width), max(0, height - image.height)
    if missing_x or missing_y:
        canvas = Image.new(image.mode, (image.width + missing_x, image.height + missing_y))
        canvas.paste(image, (missing_x // 2, missing_y // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))

"""What to compare with: the codecs that Pillow carries, measured here, and curves that others have published.

Each codec is a function (PIL RGB image, setting) -> bytes of a complete file, as a user would have it on disk.
"""
import io

from PIL import Image

from hfd import HFDError


def save(image, kind, **options):
    """The bytes of `image` in the format that Pillow calls `kind`. HFDError where Pillow was built without it."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except KeyError:
        raise HFDError(f"this Pillow was built without {kind}; the wheel that requirements.txt names has it") from None
    return buffer.getvalue()


def decode(data):
    """Bytes of any of these files to a PIL RGB image."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def jpeg(image, quality):
    """JPEG (1992), quality 0 .. 95, with Huffman tables made for the picture."""
    return save(image, "JPEG", quality=quality, optimize=True)


def jpeg2000(image, rate):
    """JPEG 2000, at a given compression ratio: 24 means 24 / 24 = 1 bit per pixel. Irreversible wavelet and colour transform."""
    return save(image, "JPEG2000", quality_mode="rates", quality_layers=[rate], irreversible=True, mct=1)


def webp(image, quality):
    """WebP (lossy, the key frames of VP8), quality 0 .. 100, slowest and best method."""
    return save(image, "WEBP", quality=quality, method=6)


def avif(image, quality, subsampling="4:2:0"):
    """AVIF (the key frames of AV1), quality 0 .. 100, at Pillow's default speed. subsampling: "4:2:0" or "4:4:4"."""
    return save(image, "AVIF", quality=quality, speed=6, subsampling=subsampling)


# Name: (function, settings from small files to large ones).
CODECS = {
    "JPEG": (jpeg, (5, 10, 20, 30, 50, 70)),
    "JPEG 2000": (jpeg2000, (160, 80, 40, 24)),
    "WebP": (webp, (1, 5, 10, 20, 35, 50, 70)),
    "AVIF": (avif, (10, 20, 30, 40, 50, 60)),
}

# Mean bits per pixel and mean PSNR (dB) of RGB over the 24 Kodak pictures, as published. Valid for Kodak only.
COMPRESSAI = "CompressAI, results/image/kodak"
PUBLISHED = {
    "BPG 4:4:4": (COMPRESSAI, ((.068, 26.20), (.161, 28.68), (.352, 31.59), (.685, 34.86))),
    "VTM": (COMPRESSAI, ((.112, 28.49), (.246, 31.20), (.491, 34.26))),
    "bmshj2018-factorized": (COMPRESSAI + "; Balle et al. 2018, trained for MSE",
                             ((.123, 26.91), (.189, 28.22), (.288, 29.62), (.440, 31.28), (.648, 32.96), (.967, 35.38))),
    "ELIC": (COMPRESSAI + "; He et al. 2022", ((.123, 29.11), (.197, 30.70), (.334, 32.78), (.491, 34.58), (.704, 36.49))),
    "HiFiC": ("Mentzer et al. 2020", ((.183, 27.56), (.351, 29.65), (.538, 31.74))),
    "MS-ILLM": ("Muckley et al. 2023", ((.081, 25.92), (.153, 27.53), (.296, 29.63))),
}

"""What to compare with: the codecs that Pillow carries, and curves that others have published."""
import io

from PIL import Image

# Name: (what Pillow is told besides the setting, settings from small files to large ones).
CODECS = {
    "JPEG": ({"optimize": True}, (5, 10, 20, 30, 50, 70)),
    # The setting is the compression ratio: 24 means 24 / 24 = 1 bit per pixel.
    "JPEG 2000": ({"quality_mode": "rates", "irreversible": True, "mct": 1}, (160, 80, 40, 24)),
    # The key frames of VP8, by the slowest and best method.
    "WebP": ({"method": 6}, (1, 5, 10, 20, 35, 50, 70)),
    # The key frames of AV1, at Pillow's default speed, with colour at half the resolution; by one
    # thread, for files depend on their number.
    "AVIF": ({"speed": 6, "max_threads": 1}, (10, 20, 30, 40, 50, 60)),
}


def encode(name, image, setting):
    """The bytes of a PIL RGB image as a complete file of the codec with that name."""
    buffer, (options, _) = io.BytesIO(), CODECS[name]
    # For JPEG 2000 the setting is `quality_layers`, for the others `quality`: each heeds its own.
    image.save(buffer, name.replace(" ", ""), quality=setting, quality_layers=[setting], **options)
    return buffer.getvalue()


def decode(data):
    """The bytes of any of these files to a PIL RGB image."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def largest_within(size, name, image):
    """(bytes, quality) of the best file of at most `size` bytes, or of the smallest there is. Not
    for JPEG 2000, whose setting is another."""
    for quality in range(1, 96):                            # files grow with it
        file = encode(name, image, quality)
        if quality > 1 and len(file) > size:
            break
        best = file, quality
    return best


# Mean bits per pixel and PSNR (dB) of RGB over the 24 Kodak pictures, as published: the first four
# by CompressAI (results/image/kodak), HiFiC by Mentzer et al. 2020, MS-ILLM by Muckley et al. 2023.
PUBLISHED = {
    "BPG 4:4:4": ((.068, 26.20), (.161, 28.68), (.352, 31.59), (.685, 34.86)),
    "VTM": ((.112, 28.49), (.246, 31.20), (.491, 34.26)),
    # Balle et al. 2018, trained for MSE.
    "bmshj2018-factorized": ((.123, 26.91), (.189, 28.22), (.288, 29.62), (.440, 31.28),
                             (.648, 32.96), (.967, 35.38)),
    "ELIC": ((.123, 29.11), (.197, 30.70), (.334, 32.78), (.491, 34.58), (.704, 36.49)),
    "HiFiC": ((.183, 27.56), (.351, 29.65), (.538, 31.74)),
    "MS-ILLM": ((.081, 25.92), (.153, 27.53), (.296, 29.63)),
}

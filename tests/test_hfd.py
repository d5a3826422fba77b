"""Autoencoder, noise, denoisers, samplers: what must be true of them before any training."""
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import memory_within

import entropy
import hfd
import sample

CASES = int(os.environ.get("HOSTILE", 150))                     # damaged archives of each kind


def perturbed(network):
    """The network in float64, with weights everywhere: layers of zeros might hide a mistake."""
    torch.manual_seed(0)
    for p in network.double().requires_grad_(False).parameters():
        p.add_(0.05 * torch.randn_like(p))
    return network


def small_autoencoder(**settings):
    """An untrained autoencoder, narrow."""
    return hfd.Autoencoder(hfd.AutoencoderConfig(latents=24, widths=(8, 8, 8, 8), **settings))


def small_denoiser(kind="plus", widths=(4, 8), blocks=(1, 1), **settings):
    """An untrained denoiser, narrow."""
    config = hfd.DiffusionConfig(widths=widths, blocks=blocks, kind=kind, **settings)
    return hfd.DENOISERS[kind](config)


@pytest.fixture
def denoiser(monkeypatch):
    """A small denoiser, which computes in float64."""
    def never(device):
        return False
    monkeypatch.setattr(hfd, "fast_bf16", never)
    return perturbed(small_denoiser())


# The autoencoder ----------------------------------------------------------------------------------


def test_bases_are_orthonormal():
    """The functions that the linear path starts from are orthonormal, and orthogonal to their
    neighbours', which overlap them by half. The denoiser's planes are orthonormal, too."""
    assert torch.allclose(hfd.PLANES @ hfd.PLANES.T, torch.eye(12).double())
    basis = hfd.transform_basis(768).double()                   # all of them
    for di, dj in ((0, 0), (0, 16), (16, 0), (16, 16)):
        a, b = basis[..., di:, dj:].flatten(1), basis[..., :32 - di, :32 - dj].flatten(1)
        assert torch.allclose(a @ b.T, torch.eye(768).double() * (di == dj == 0), atol=2e-6)


@pytest.mark.parametrize("count, decibels", [(768, 120), (96, 21)])
def test_untrained_transform_is_a_codec(photo, count, decibels):
    """Before any training, analysis and synthesis with all functions give the picture back, and
    with an eighth of them a usable one."""
    x, q = sample.to_tensor(photo.crop((0, 0, 96, 64)), "cpu"), torch.tensor([0])
    model = hfd.Autoencoder(hfd.AutoencoderConfig((1,), count, (8,) * 4, (0,) * 4))
    model.requires_grad_(False)
    error = (model.synthesis(model.analysis(x, q), q) - x)[..., 16:-16, 16:-16]
    assert -10 * math.log10(error.square().mean() / 4) > decibels


@pytest.mark.parametrize("build, settings", [
    (small_autoencoder, {"prior": "factorized"}), (small_autoencoder, {"prior": "context"}),
    *((small_denoiser, {"kind": kind}) for kind in hfd.DENOISERS)])
def test_gradients_reach_everything(build, settings):
    """The loss gives every parameter a gradient, with both priors and in each kind of denoiser."""
    model, x, q = build(**settings), torch.rand(6, 3, 32, 32) * 2 - 1, torch.arange(6)
    for p in model.parameters():                # layers of zeros would hold the others' back
        p.data += 0.05 * torch.randn_like(p)
    if build is small_autoencoder:
        model(x, q)["loss"].mean().backward()
    else:
        model(x, x + 0.1 * torch.randn_like(x), q).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_steps_feel_rate_and_distortion():
    """The rate wants a step wider, the error wants it narrower. The error is that of the picture
    that a file would give, and rounding, which has no gradient, does not keep its from the
    encoder."""
    model, x, q = small_autoencoder(), torch.rand(4, 3, 64, 64) - 0.5, torch.zeros(4).long()
    model.prior.fit_scale(model.analysis(x, q))
    model(x, q)["bpp"].mean().backward()
    assert model.log_step.grad[0].sum() < 0                     # descending, log_step grows
    model.zero_grad()
    mse = model(x, q)["mse"]
    real = (model.decode(model.encode(x[:1], 0), 0) - x[:1]).square().mean() * 127.5 ** 2
    assert mse[0].item() == pytest.approx(real.item(), rel=1e-3)
    mse.mean().backward()
    assert model.log_step.grad[0].sum() > 0
    assert not model.log_step.grad[1:].any()                    # other levels are not concerned
    assert model.analysis.linear[-1].weight.grad.any()


@pytest.mark.parametrize("value, count, refusal", [
    (math.nan, 1, hfd.HFDError), (1e12, 1, hfd.HFDError), (0, 2, ValueError)])
def test_what_no_file_can_hold_is_refused(value, count, refusal):
    """Not a number, a huge one, or a second picture: none is lost without a word."""
    model = small_autoencoder().requires_grad_(False)
    model.analysis.linear[-1].bias[3] = value
    with pytest.raises(refusal, match="no file can hold|one picture"):
        model.encode(torch.zeros(count, 3, 32, 32), 0)


# Noise, and samplers on data whose best denoiser is known -----------------------------------------


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_schedule(eta):
    """log SNR falls from 15 to -15. eta = 1 is the cosine schedule, alpha = cos(pi t / 2); another
    eta shifts it by -2 log eta, so that sigma / alpha = eta at t = 1/2."""
    t, inner = torch.linspace(0, 1, 101, dtype=torch.float64), slice(5, 96)
    log_snr = hfd.log_snr_at(t, eta)
    assert log_snr[0] == 15 and log_snr[-1] == -15 and (log_snr.diff() <= 0).all()
    assert hfd.log_snr_at(t.float(), eta).isfinite().all()
    alpha, sigma = hfd.alpha_sigma(log_snr)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones_like(t))
    assert (sigma / alpha)[50].item() == pytest.approx(eta)
    cosine, _ = hfd.alpha_sigma(log_snr + 2 * math.log(eta))
    assert torch.allclose(cosine[inner], torch.cos(math.pi / 2 * t)[inner])


def test_velocity_identities():
    """x = alpha z - sigma v, so a network that knows v knows x; and eps = sigma z + alpha v, which
    is standard normal. The times of a batch are spread evenly."""
    model, x = small_denoiser("plain"), torch.rand(8, 3, 32, 32)
    log_snr, z, v = model.diffuse(x)

    def knows(*given):
        return v
    model.velocity = knows
    assert torch.allclose(model.predict_x(z, log_snr, None), x, atol=1e-5)
    alpha, sigma = hfd.alpha_sigma(log_snr[:, None, None, None])
    eps = sigma * z + alpha * v
    assert torch.allclose(alpha * x + sigma * eps, z, atol=1e-5)
    assert abs(eps.mean()) < 0.05 and eps.std().item() == pytest.approx(1, abs=0.05)
    t = torch.atan(torch.exp(-log_snr / 2) / model.config.eta) * 2 / math.pi
    assert torch.allclose(t.sort().values.diff(), torch.full((7,), 1 / 8), atol=1e-3)


def test_ancestral_step_is_the_posterior():
    """With the true x, a step has mean and variance of q(z_s | z_t, x) as Bayes' rule has them."""
    log_snr_t, log_snr_s = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    (a_t, s_t), (a_s, s_s) = hfd.alpha_sigma(log_snr_t), hfd.alpha_sigma(log_snr_s)
    # z_s ~ N(a_s x, s_s^2), and z_t given z_s ~ N(r z_s, rest): multiply the two Gaussians.
    x, z_t, r = 0.4, 0.9, a_t / a_s
    rest = s_t ** 2 - r ** 2 * s_s ** 2
    precision = 1 / s_s ** 2 + r ** 2 / rest
    mean = (a_s * x / s_s ** 2 + r * z_t / rest) / precision
    eps = torch.tensor([0.0, 1.0], dtype=torch.float64)         # in place of random noise
    z = hfd.ddpm_step(0 * eps + z_t, 0 * eps + x, log_snr_t, log_snr_s, eps.clone)
    assert torch.allclose(z, mean + eps * precision.rsqrt())


def sampled(sampler, steps, eta, schedule=hfd.log_snr_at, count=30_000):
    """`count` numbers, sampled with the best denoiser for x ~ N(0.3, 0.1^2), in closed form."""
    generator = torch.Generator().manual_seed(1)

    def predict_x(z, log_snr):
        alpha, sigma = hfd.alpha_sigma(log_snr)
        gain = alpha * 0.1 ** 2 / (alpha ** 2 * 0.1 ** 2 + sigma ** 2)
        return 0.3 + gain * (z - alpha * 0.3)

    def noise():
        return torch.randn(count, generator=generator, dtype=torch.float64)

    def shifted(t):
        return schedule(t, eta)
    return hfd.sample(predict_x, steps, hfd.SAMPLERS[sampler](), shifted, noise)


@pytest.mark.parametrize("schedule", [hfd.log_snr_at, hfd.flow_log_snr_at])
@pytest.mark.parametrize("sampler", hfd.SAMPLERS)
@pytest.mark.parametrize("eta, tolerance", [(0.1, 0.02), (0.5, 0.04)])
def test_samplers_on_gaussian_data(sampler, eta, tolerance, schedule):
    """All samplers return the data's mean and spread, the more exactly the more steps they take."""
    few, many = (sampled(sampler, steps, eta, schedule) for steps in (8, 200))
    assert few.mean().item() == pytest.approx(0.3, abs=0.003)
    assert many.mean().item() == pytest.approx(0.3, abs=0.003)
    assert abs(many.std() / 0.1 - 1) < min(tolerance, abs(few.std() / 0.1 - 1))


def test_what_brings_samples_nearer():
    """For a residual of 0.1, eta = 0.1 beats 0.02 and the paper's 0.5 in eight steps; and eight
    steps of second order beat twenty of DDIM."""
    def error(*how):
        return abs(sampled(*how).std().item() / 0.1 - 1)
    assert error("ddim", 8, 0.1) < min(error("ddim", 8, 0.02), error("ddim", 8, 0.5) / 2, 0.16)
    assert error("dpm", 8, 0.1) < error("ddim", 20, 0.1)


@pytest.mark.parametrize("steps, eta", [(1000, 0.05), (6, 5e-4), (6, 1000)])
def test_steps_where_the_schedule_is_clamped(steps, eta):
    """With very many steps, or an extreme eta, log SNR stands still in some of them: nothing moves
    there, and nothing is divided by it."""
    x = sampled("dpm", steps, eta, count=1000)
    assert x.isfinite().all() and x.mean().item() == pytest.approx(0.3, abs=0.02)


# Extensions: closed form, HFD+, rectified flow ----------------------------------------------------


@pytest.mark.parametrize("kind", ["preconditioned", "plus"])
def test_closed_form_start(kind):
    """Before training the denoiser is the best one for x ~ N(x_hat, s^2), the posterior mean; and
    its loss on such pictures is 1, in units of what no such denoiser can know."""
    model, q = small_denoiser(kind).double(), torch.arange(24) % 6
    model.residual_std *= torch.linspace(0.2, 1.2, 6)[:, None] * torch.linspace(0.5, 1.5, 12)
    s = model.residual_std[q][:, :, None, None]                 # (24, 12, 1, 1): each has its own
    x_hat, log_snr = torch.rand(24, 3, 32, 32).double(), torch.linspace(-5, 5, 24).double()
    z = torch.randn_like(x_hat)
    alpha, sigma = hfd.alpha_sigma(log_snr[:, None, None, None])
    gain = alpha * s ** 2 / (alpha ** 2 * s ** 2 + sigma ** 2)
    mean = x_hat + hfd.from_planes(gain * hfd.to_planes(z - alpha * x_hat))
    assert torch.allclose(model.predict_x(z, log_snr, q, x_hat), mean, atol=1e-6)
    x = x_hat + hfd.from_planes(s * torch.randn(24, 12, 16, 16))
    assert model(x, x_hat, q).item() == pytest.approx(1, abs=0.03)


def test_hfd_plus():
    """The map says in powers of two how much stronger than usual a block's residual is. The
    network sees it, and whether there is one; in training half of the pictures have one."""
    model, seen = small_denoiser(), []

    def look(net, inputs):
        seen.append(inputs[0][:, 24:])
    model.net.register_forward_pre_hook(look)
    x, x_hat, q = torch.zeros(1, 3, 64, 96), torch.zeros(1, 3, 64, 96), torch.tensor([0])
    x[..., :32, :32], x[..., 32:, :32] = 0.2, 0.1               # usual is 0.1
    energy = hfd.residual_energy(x, x_hat, model.residual_std[q], 32)
    assert energy[0, 0].tolist() == [[6, 0, 0], [4, 0, 0]]
    for given in (energy, None, energy * 0 - 1):
        model.velocity(x, torch.zeros(1), q, x_hat, given)
    assert seen[0].shape == (1, 2, 32, 48) and (seen[0][:, 1] == 1).all()
    assert seen[0][0, 0, ::16, ::16].tolist() == [[0.5, -1, -1], [0, -1, -1]]
    assert not seen[1].any() and not seen[2].any()
    x = torch.zeros(100, 3, 16, 16)
    model(x, x + 0.2, torch.zeros(100).long())                  # level 6, seen as (6 - 4) / 4
    there = seen[3][:, 1, 0, 0]
    assert (seen[3] == torch.stack([there / 2, there], dim=1)[:, :, None, None]).all()
    assert 25 < there.sum() < 75


@pytest.mark.parametrize("kind", ["plain", "preconditioned"])
def test_a_denoiser_without_the_map_ignores_it(kind):
    """A file's map is advice: whoever cannot use it samples all the same."""
    model, x_hat = perturbed(small_denoiser(kind)).float(), torch.zeros(1, 3, 32, 32)
    x, same = (hfd.sample_picture(model, x_hat, 2, energy, steps=2)
               for energy in (None, torch.zeros(1, 1, 2, 2)))
    assert torch.equal(x, same)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_rectified_flow_is_a_schedule(eta):
    """Its line (1 - t') x + t' eps is z times a constant, straight in t' = t for eta = 1, and in
    t' = eta t / (1 - t + eta t) for others; an error in eps - x is alpha + sigma times that in v;
    and Euler's step along the line is DDIM's."""
    x, eps, error = torch.randn(3, 1000, dtype=torch.float64)
    (t, log_snr_t), (s, log_snr_s) = ((eta * t / (1 - t + eta * t), hfd.flow_log_snr_at(t, eta))
                                      for t in torch.tensor([0.7, 0.4], dtype=torch.float64))
    assert eta != 1 or (t, s) == (0.7, 0.4)
    (alpha, sigma), scale_s = hfd.alpha_sigma(log_snr_t), sum(hfd.alpha_sigma(log_snr_s))
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    line = (1 - t) * x + t * eps
    assert torch.allclose(line, z / (alpha + sigma))

    def flow(v):
        return (sigma - alpha) * z + (alpha + sigma) * v
    assert torch.allclose(flow(v), eps - x)
    assert torch.allclose(flow(v + error) - flow(v), (alpha + sigma) * error)
    guess = x + error                                           # a network's x; below, its eps - x
    euler = line + (s - t) * ((line - (1 - t) * guess) / t - guess)
    assert torch.allclose(hfd.ddim_step(z, guess, log_snr_t, log_snr_s), euler * scale_s)


# Pictures of any size -----------------------------------------------------------------------------


def receptive_radius(denoiser, side=416):
    """How far a cell of the denoised picture sees: where its gradient by z is not 0."""
    z = torch.randn(1, 3, 16, side, dtype=torch.float64, requires_grad=True)
    x = denoiser.predict_x(z, torch.zeros(1).double(), torch.tensor([0]), torch.zeros_like(z))
    x[..., side // 2:side // 2 + 16].abs().sum().backward()
    return side // 2 - z.grad.abs().sum((0, 1, 2)).nonzero().min().item()


def test_receptive_field():
    """With the blocks that ship, the U-Net sees at most 128 pixels far, whatever its widths."""
    blocks = hfd.DiffusionConfig().blocks
    radius = receptive_radius(perturbed(small_denoiser(widths=(4, 4, 4), blocks=blocks)))
    print(f"receptive field radius: {radius} px")
    assert 64 < radius <= 128


def test_autoencoder_in_tiles_is_exact():
    """Tile by tile with 160 pixels around, both transforms equal those of the whole picture, to
    1e-5, for they return float32; with nothing around they do not."""
    model, q = perturbed(small_autoencoder()), torch.tensor([3])
    x = torch.rand(1, 3, 416, 16, dtype=torch.float64) * 2 - 1
    y = model.analysis(x, q).double()
    for transform, given in ((model.analysis, x), (model.synthesis, y)):
        def f(window):
            return transform(window, q)
        whole, tiled, cut = (f(given).double() for _ in range(3))
        hfd.apply_tiled(f, [given], tiled, tile=32)
        hfd.apply_tiled(f, [given], cut, tile=32, context=0)
        assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()
        assert (cut - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("sampler", hfd.SAMPLERS)
def test_patchwise_sampling_is_whole_image_sampling(denoiser, sampler):
    """With the receptive field as context, patches of any size give what sampling all at once
    gives, to 1e-5, for the network's output is float32; with no context they do not. Noise depends
    on the seed alone."""
    x_hat, energy = torch.rand(1, 3, 64, 80).double() * 2 - 1, torch.arange(20.0).view(1, 1, 4, 5)
    exact = receptive_radius(denoiser)

    def run(patch, context=exact, seed=5):
        return hfd.sample_picture(denoiser, x_hat, 2, energy.double() % 8, steps=3, sampler=sampler,
                                  seed=seed, patch=patch, context=context)
    whole = run(80)
    assert torch.allclose(run(16), whole, atol=1e-5) and torch.allclose(run(48), whole, atol=1e-5)
    assert not torch.allclose(run(16, context=0), whole, atol=1e-3)
    assert torch.equal(run(80), whole) and not torch.equal(run(80, seed=6), whole)


@pytest.mark.parametrize("objective, usual", [("v", "dpm"), ("flow", "ddim")])
def test_the_usual_sampler_and_noise(denoiser, objective, usual):
    """A flow takes Euler's steps unless told otherwise, others the solver of second order; and the
    noise is in proportion to what is missing at that level."""
    x_hat, denoiser.config.objective = torch.zeros(1, 3, 32, 32).double(), objective
    denoiser.residual_std[2] = 0.2
    told = {"sampler": usual, "eta": 0.2 * hfd.RELATIVE_ETA}
    x, same = (hfd.sample_picture(denoiser, x_hat, 2, steps=4, **how) for how in ({}, told))
    other = hfd.sample_picture(denoiser, x_hat, 2, steps=4, sampler="ddpm")
    assert torch.allclose(x, same, atol=1e-6) and not torch.allclose(x, other, atol=1e-3)


def test_groups_take_turns(denoiser, monkeypatch):
    """The paper's groups go one after the other, and each sees what was made before; one patch
    alone is sampled as ever."""
    x_hat, turns = torch.rand(1, 3, 64, 64).double() * 2 - 1, []

    def run(patch):
        return hfd.sample_in_groups(denoiser, x_hat, 2, seed=5, steps=2, patch=patch)
    assert torch.equal(run(64), hfd.sample_picture(denoiser, x_hat, 2, seed=4 * 5, steps=2))
    grouped, honest = run(32), hfd.sample_picture

    def brighter(*given, group, **settings):
        turns.append([(r, c) for r in (0, 1) for c in (0, 1) if group(r, c)])
        x = honest(*given, group=group, **settings)
        x[..., :32, :32] += 0.5 * group(0, 0)
        return x
    monkeypatch.setattr(hfd, "sample_picture", brighter)
    assert (run(32) - grouped).abs()[..., 32:, 32:].max() > 1e-3        # of the second group
    assert turns == [[(0, 0)], [(1, 1)], [(0, 1)], [(1, 0)]]


# A model's folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", entropy.PRIORS)
def test_a_model_is_read_as_it_was_written(prior, tmp_path):
    """Matrices travel in half precision, all else as it is, the tables whole; and the identity
    changes with any weight."""
    autoencoder = perturbed(small_autoencoder(prior=prior)).float()
    hfd.save_part(tmp_path / "autoencoder.npz", autoencoder, {"steps": 7})
    model, frozen = hfd.load_model(tmp_path), autoencoder.prior.freeze(autoencoder.log_step.exp())
    for name, t in autoencoder.state_dict().items():
        expected = t.half().float() if name.endswith("weight") else t
        assert torch.equal(model.autoencoder.state_dict()[name], expected)
    assert all((a == vars(model.tables)[name]).all() for name, a in vars(frozen).items())
    assert model.recipes == {"autoencoder": {"steps": 7}} and model.diffusion is None
    autoencoder.offset[0, 0] += 1e-3
    hfd.save_part(tmp_path / "autoencoder.npz", autoencoder, {})
    assert hfd.load_model(tmp_path).identity != model.identity


def test_identity_is_the_same_everywhere(model, tiny_model, double_precision):
    """The identity names weights and tables, whatever torch's default precision is."""
    assert hfd.load_model(tiny_model).identity == model.identity


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model, to be spoiled."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def refusal(folder):
    """The one line in which load_model refuses a folder, before much memory is taken."""
    with memory_within(100), pytest.raises(hfd.HFDError) as caught:
        hfd.load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


class Trap:
    """Unpickled, it ends the program; it might as well delete a folder."""

    def __reduce__(self):
        return sys.exit, ("sprung",)


HUGE = 10 ** 400
FORGED = {
    "autoencoder settings": [
        ("latents", HUGE), ("latents", 24.5), ("latents", -24), ("latents", 23), ("unknown", 1),
        ("widths", [8, 8, 8]), ("widths", [[8], 8, 8, 8]), ("widths", 8), ("widths", [1024] * 4),
        ("blocks", [0, 0, 0, -1]), ("blocks", [HUGE] * 4), ("prior", "factorized"), ("prior", {}),
        ("lambdas", []), ("lambdas", ["a"] * 3), ("lambdas", [math.nan] * 3), ("lambdas", [HUGE])],
    "denoiser settings": [
        ("levels", 4), ("levels", HUGE), ("widths", []), ("widths", [8, 2000]), ("eta", math.nan),
        ("eta", "1"), ("kind", "plain"), ("objective", "none")],
    "autoencoder text": [("format", "hfd 0"), ("config", None)],
    "denoiser text": [("autoencoder", "00000000"), ("config", [1, 2])],
    "autoencoder arrays": [
        ("json", np.frombuffer(b"[" * 100_000, np.uint8)), ("json", np.array("[]")), ("json", None),
        ("weights.log_step", np.zeros((3, 23))), ("weights.log_step", np.full((3, 24), "a")),
        ("weights.log_step", np.full((3, 24), Trap(), object)), ("weights.log_step", None),
        ("weights.more", np.zeros(3)), ("tables.more", np.zeros(3)), ("tables.low", None),
        ("tables.near", None), ("tables.cdf", np.zeros(5, np.int32)),
        ("tables.octaves", np.zeros((1, 24), np.int32))]}


@pytest.mark.parametrize("kind, name, value", [(kind, *f) for kind in FORGED for f in FORGED[kind]])
def test_forged_archives_are_refused(folder, kind, name, value):
    """Numbers that cannot be meant, texts without end, objects that would run, parts that are
    missing (None) or do not fit: a model is refused when it is loaded, not when it is used."""
    part, where = kind.split()
    path = folder / f"{part}.npz"
    about, arrays = hfd.read_archive(path)
    {"settings": about["config"], "text": about, "arrays": arrays}[where][name] = value
    arrays = {"json": np.frombuffer(json.dumps(about).encode(), np.uint8)} | arrays
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    assert str(path) in refusal(folder)


def test_what_is_no_archive_is_refused(folder):
    """A text, a compressed bomb, a header that claims a terabyte, nothing at all: one line each."""
    path = folder / "autoencoder.npz"
    path.write_text("a text")
    assert str(path) in refusal(folder)
    np.savez_compressed(path, json=np.zeros(2 * 10 ** 8, np.uint8))
    assert path.stat().st_size < 10 ** 6 and str(path) in refusal(folder)
    with zipfile.ZipFile(path, "w") as archive, archive.open("json.npy", "w") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10 ** 12,)}
        np.lib.format.write_array_header_1_0(f, header)
    assert str(path) in refusal(folder)
    path.unlink()
    assert "no such file" in refusal(folder)


@pytest.mark.parametrize("name", ["autoencoder.npz", "denoiser.npz"])
def test_damaged_archives_are_refused(folder, name):
    """Cut off, overwritten or with any bit flipped, an archive is refused, or says exactly what it
    said. (HOSTILE=10000 in the environment tries so many.)"""
    path, rng, refused = folder / name, np.random.default_rng(0), 0
    (about, arrays), original = hfd.read_archive(path), path.read_bytes()
    for case in range(CASES):
        at = int(rng.integers(len(original)))
        flipped = bytes([original[at] ^ 1 << int(rng.integers(8))]) + original[at + 1:]
        path.write_bytes(original[:at] + (flipped, rng.bytes(8) + original[at + 8:], b"")[case % 3])
        try:
            told, found = hfd.read_archive(path)
            assert told == about and list(found) == list(arrays)
            assert all(np.array_equal(a, arrays[of]) for of, a in found.items())
        except hfd.HFDError as error:
            assert name in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 0.9 * CASES

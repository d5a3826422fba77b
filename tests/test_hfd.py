"""Autoencoder, noise, denoisers, samplers: what must be true of them before any training."""
import math

import pytest
import torch
from conftest import refusal

import entropy
import hfd
import sample


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
    monkeypatch.setattr(hfd, "fast_bf16", lambda device: False)
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
    """The loss gives every parameter a gradient, with both priors and in each kind of denoiser, for
    each quality level, and from each plane of z_t and x_hat that the U-Net sees."""
    model, x, q = build(**settings), torch.rand(6, 3, 32, 32) * 2 - 1, torch.arange(6)
    for p in model.parameters():                # layers of zeros would hold the others' back
        p.data += 0.05 * torch.randn_like(p)
    if build is small_autoencoder:
        model(x, q)["loss"].mean().backward()
    else:
        model(x, q, x + 0.1 * torch.randn_like(x))["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
        assert len(p) != 6 or p.grad.flatten(1).any(dim=1).all(), name          # of each level
        if name == "net.stem.weight":
            assert p.grad[:, :24].abs().sum(dim=(0, 2, 3)).all()                # of each plane


def test_steps_feel_rate_and_distortion():
    """The rate wants a step wider, the error wants it narrower: the error of the picture that a
    file would give. Rounding, which has no gradient, does not keep it from the encoder."""
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


@pytest.mark.parametrize("value", [math.nan, 1e12])
def test_a_ruined_model_makes_no_files(value):
    """Weights that training blew up make latents that no file can hold, and the encoder says so."""
    model = small_autoencoder().requires_grad_(False)
    model.analysis.linear[-1].bias[3] = value
    assert "training has failed" in refusal(model.encode, torch.zeros(1, 3, 32, 32), 0)


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
    is standard normal. Times are drawn anew, spread evenly over a batch. The loss is v's MSE."""
    model, x = small_denoiser("plain", eta=1.0), torch.rand(8, 3, 32, 32)
    log_snr, z, v = model.diffuse(x)                # at eta = 1 the clamp hardly moves any t
    model.velocity = lambda *given: v
    assert torch.allclose(model.predict_x(z, log_snr, None), x, atol=1e-5)
    alpha, sigma = hfd.alpha_sigma(log_snr[:, None, None, None])
    eps = sigma * z + alpha * v
    assert abs(eps.mean()) < 0.05 and eps.std().item() == pytest.approx(1, abs=0.05)
    t = torch.atan(torch.exp(-log_snr / 2) / model.config.eta) * 2 / math.pi
    assert torch.allclose(t.sort().values.diff(), torch.full((7,), 1 / 8), atol=1e-3)
    assert not torch.equal(model.diffuse(x)[0], log_snr)
    model.velocity, model.diffuse = lambda *given: v + 0.1, lambda x: (log_snr, z, v)
    assert model(x, None, x)["loss"].item() == pytest.approx(0.01, rel=1e-3)


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


def sampled(sampler, steps, eta, schedule=hfd.log_snr_at):
    """Many numbers, sampled with the best denoiser for x ~ N(0.3, 0.1^2), in closed form."""
    generator = torch.Generator().manual_seed(1)

    def predict_x(z, log_snr):
        alpha, sigma = hfd.alpha_sigma(log_snr)
        gain = alpha * 0.1 ** 2 / (alpha ** 2 * 0.1 ** 2 + sigma ** 2)
        return 0.3 + gain * (z - alpha * 0.3)

    def noise():
        return torch.randn(30_000, generator=generator, dtype=torch.float64)
    log_snr = schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64), eta)
    return hfd.sample_loop(predict_x, log_snr, hfd.SAMPLERS[sampler](), noise)


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
    """For a residual of 0.1, eta = 0.1 beats 0.02 and 0.5; second order beats DDIM's 20 steps."""
    def error(*how):
        return abs(sampled(*how).std().item() / 0.1 - 1)
    assert error("ddim", 8, 0.1) < min(error("ddim", 8, 0.02), error("ddim", 8, 0.5) / 2, 0.16)
    assert error("dpm", 8, 0.1) < error("ddim", 20, 0.1)


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
    assert model(x, q, x_hat)["loss"].item() == pytest.approx(1, abs=0.03)


def test_hfd_plus():
    """The map says in powers of two how much stronger than usual a block's residual is. The network
    sees it, and whether there is one: half of the pictures in training have. Others ignore it."""
    model, seen = small_denoiser(), []
    model.net.register_forward_pre_hook(lambda net, given: seen.append(given[0][:, 24:]))
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
    model(x, torch.zeros(100).long(), x + 0.2)                  # level 6, seen as (6 - 4) / 4
    there = seen[3][:, 1, 0, 0]
    assert (seen[3] == torch.stack([there / 2, there], dim=1)[:, :, None, None]).all()
    assert 25 < there.sum() < 75
    plain, x_hat = perturbed(small_denoiser("plain")).float(), torch.zeros(1, 3, 64, 96)
    told, untold = (hfd.sample_picture(plain, x_hat, 2, map_, steps=2) for map_ in (energy, None))
    assert torch.equal(told, untold)
    assert not torch.equal(untold, hfd.sample_picture(plain, x_hat + 0.1, 2, steps=2))


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_rectified_flow_is_a_schedule(eta):
    """Its line (1 - t') x + t' eps, t' = eta t / (1 - t + eta t), is z times a constant; eps - x is
    v times alpha + sigma, plus what is known; Euler's step along the line is DDIM's."""
    x, eps, error = torch.randn(3, 1000, dtype=torch.float64)
    (t, log_snr_t), (s, log_snr_s) = ((eta * t / (1 - t + eta * t), hfd.flow_log_snr_at(t, eta))
                                      for t in torch.tensor([0.7, 0.4], dtype=torch.float64))
    assert eta != 1 or (t, s) == (0.7, 0.4)
    (alpha, sigma), scale_s = hfd.alpha_sigma(log_snr_t), sum(hfd.alpha_sigma(log_snr_s))
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    line = (1 - t) * x + t * eps
    assert torch.allclose(line, z / (alpha + sigma))
    assert torch.allclose((sigma - alpha) * z + (alpha + sigma) * v, eps - x)
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
    """With the blocks that ship, the U-Net sees at most 128 pixels far, and more than 64."""
    blocks = hfd.DiffusionConfig().blocks
    denoiser = perturbed(small_denoiser(widths=(4, 4, 4), blocks=blocks))
    assert 64 < receptive_radius(denoiser) <= 128


def test_autoencoder_in_tiles_is_exact():
    """Tile by tile with 160 pixels around, both transforms equal those of the whole picture, to
    1e-5, for they return float32; with nothing around they do not."""
    model, q = perturbed(small_autoencoder()), torch.tensor([3])
    x = torch.rand(1, 3, 416, 16, dtype=torch.float64) * 2 - 1
    y = model.analysis(x, q).double()
    for transform, given in ((model.analysis, x), (model.synthesis, y)):
        def f(window):
            return transform(window, q)
        whole = f(given).double()
        tiled, cut = torch.zeros_like(whole), torch.zeros_like(whole)
        hfd.apply_tiled(f, [given], tiled, tile=32)
        hfd.apply_tiled(f, [given], cut, tile=32, context=0)
        assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()
        assert (cut - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("sampler", hfd.SAMPLERS)
def test_patchwise_sampling_is_whole_image_sampling(denoiser, sampler):
    """With the receptive field as context, patches give what sampling all at once gives, to 1e-5
    (float32 lies between); with no context they do not."""
    x_hat, energy = torch.rand(1, 3, 64, 80).double() * 2 - 1, torch.arange(20.0).view(1, 1, 4, 5)
    exact = receptive_radius(denoiser)

    def run(patch, context=exact):
        return hfd.sample_picture(denoiser, x_hat, 2, energy.double() % 8, steps=3, sampler=sampler,
                                  patch=patch, context=context)
    whole = run(80)
    assert torch.allclose(run(16), whole, atol=1e-5) and torch.allclose(run(48), whole, atol=1e-5)
    assert not torch.allclose(run(16, context=0), whole, atol=1e-3)


def test_groups_take_turns(denoiser, monkeypatch):
    """The paper's groups go one after the other, and each sees what was made before; one patch
    alone is sampled as ever."""
    x_hat, turns = torch.rand(1, 3, 64, 64).double() * 2 - 1, []

    def run(patch):
        return hfd.sample_in_groups(denoiser, x_hat, 2, seed=5, steps=2, patch=patch)
    assert torch.equal(run(64), hfd.sample_picture(denoiser, x_hat, 2, seed=4 * 5, steps=2))
    grouped, honest = run(32), hfd.sample_picture
    first = honest(denoiser, x_hat, 2, seed=4 * 5, steps=2, patch=32, group=(0, 0), known=x_hat)
    assert torch.equal(grouped[..., :32, :32], first[..., :32, :32])    # and it stays

    def brighter(*given, group, **settings):
        turns.append(group)
        x = honest(*given, group=group, **settings)
        x[..., :32, :32] += 0.5 * (group == (0, 0))
        return x
    monkeypatch.setattr(hfd, "sample_picture", brighter)
    assert (run(32) - grouped).abs()[..., 32:, 32:].max() > 1e-3        # of the second group
    assert turns == [(0, 0), (1, 1), (0, 1), (1, 0)]


# A model's folder ---------------------------------------------------------------------------------
@pytest.mark.parametrize("prior", entropy.PRIORS)
def test_a_model_is_read_as_it_was_written(prior, tmp_path, request):
    """Matrices travel in half precision, all else as it is, the tables whole. The identity changes
    with a weight, but not with torch's default precision."""
    autoencoder = perturbed(small_autoencoder(prior=prior)).float()
    hfd.save_part(tmp_path / "autoencoder.npz", autoencoder, {"steps": 7})
    model, frozen = hfd.load_model(tmp_path), autoencoder.prior.freeze(autoencoder.log_step.exp())
    for name, t in autoencoder.state_dict().items():
        expected = t.half().float() if name.endswith("weight") else t
        assert torch.equal(model.autoencoder.state_dict()[name], expected)
    assert all((a == vars(model.tables)[name]).all() for name, a in vars(frozen).items())
    assert model.recipes == {"autoencoder": {"steps": 7}} and model.diffusion is None
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    assert hfd.load_model(tmp_path).identity == model.identity
    autoencoder.offset[0, 0] += 1e-3
    hfd.save_part(tmp_path / "autoencoder.npz", autoencoder, {})
    assert hfd.load_model(tmp_path).identity != model.identity

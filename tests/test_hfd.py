"""The autoencoder, the noise, the samplers: what must be true of them before any training."""
import math

import numpy as np
import pytest
import torch

import entropy
import hfd

torch.manual_seed(0)


def perturbed(module, scale=0.05, seed=0):
    """The module in float64 with random weights everywhere, so that no zero-initialised layer hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().requires_grad_(False)
    for p in module.parameters():
        if p.dim() > 1:
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.fixture(scope="module")
def denoiser():
    return perturbed(hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 12, 16))))


@pytest.fixture(scope="module")
def autoencoder():
    config = hfd.AutoencoderConfig(latents=24, widths=(8, 8, 12, 12))
    return perturbed(hfd.Autoencoder(config))


# The transform ------------------------------------------------------------------------------------------

def test_basis_is_orthonormal():
    """The functions that the linear path starts from are orthonormal, also against their overlapping neighbours."""
    basis = hfd.transform_basis(768).double()                                                   # all of them
    for di in (0, 16):
        for dj in (0, 16):
            a, b = basis[..., di:, dj:].flatten(1), basis[..., :32 - di, :32 - dj].flatten(1)
            expected = torch.eye(768) if di == dj == 0 else torch.zeros(768, 768)
            assert torch.allclose(a @ b.T, expected.double(), atol=2e-6)


def test_untrained_transform_is_a_codec(photo):
    """With all functions and no quantization, analysis followed by synthesis gives the picture back before any training;
    with a third of them it already is a usable codec."""
    x = torch.from_numpy(np.array(photo.crop((0, 0, 96, 64)))).permute(2, 0, 1)[None].float() / 127.5 - 1
    q = torch.tensor([0])
    for count, smallest in ((768, 60), (320, 22)):
        model = hfd.Autoencoder(hfd.AutoencoderConfig(latents=count, widths=(8, 8, 8, 8), blocks=(0, 0, 0, 0)))
        with torch.no_grad():
            x_hat = model.synthesis(model.analysis(x, q), q)
        inside = (x_hat - x)[..., 16:-16, 16:-16].square().mean() / 4                           # peak-to-peak is 2
        assert -10 * math.log10(inside) > smallest


def small_autoencoder():
    """An untrained autoencoder, narrow."""
    return hfd.Autoencoder(hfd.AutoencoderConfig(latents=24, widths=(8, 8, 8, 8)))


def smooth_picture(side, cells):
    """A picture (1, 3, side, side) without edges, random in so many cells a side."""
    return torch.nn.functional.interpolate(torch.rand(1, 3, cells, cells), size=(side, side), mode="bilinear") * 2 - 1


NETWORKS = {"autoencoder": small_autoencoder} | {
    f"{objective}, preconditioned: {p}": lambda o=objective, p=p: hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 12), preconditioned=p, objective=o))
    for objective in ("v", "flow") for p in (True, False)}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_everything(name):
    """The loss gives every parameter a gradient: the quantization steps, and the U-Net in both parameterisations and objectives."""
    model, x, q = NETWORKS[name](), torch.rand(12, 3, 64, 64) * 2 - 1, torch.arange(12) % 6
    for p in model.parameters():                                        # zero layers would hold the others' gradient back
        p.data += 0.05 * torch.randn_like(p)
    loss = model(x, q)["loss"] if name == "autoencoder" else model(x, x + 0.1 * torch.randn_like(x), q)
    loss.mean().backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, parameter


def test_steps_feel_rate_and_distortion():
    """The step size is pulled both ways: the rate wants it wider, the distortion narrower."""
    model = small_autoencoder()
    x, q = torch.rand(4, 3, 64, 64) * 2 - 1, torch.zeros(4, dtype=torch.long)
    model.prior.fit_scale(model.analysis(x, q))
    model(x, q)["bpp"].mean().backward()
    assert model.log_step.grad[0].sum() < 0                             # descending, log_step grows
    model.log_step.grad = None
    model(x, q)["mse"].mean().backward()
    assert model.log_step.grad[0].sum() > 0                             # descending, log_step shrinks
    assert model.log_step.grad[1:].abs().sum() == 0                     # other levels are not concerned


def test_refined_latents_cost_less():
    """Descending the gradient of a picture's own rate + lambda * MSE finds a latent that costs less, the same one each time."""
    model, x, q, done = small_autoencoder().requires_grad_(False), smooth_picture(96, 12), 3, []
    model.prior.fit_scale(model.analysis(x, torch.tensor([q])))

    def cost(k):
        bpp, mse = model.cost(k.float(), k.float(), x, torch.tensor([q]))
        return (bpp + model.config.lambdas[q] * mse).item()

    plain, refined = model.encode(x, q), model.encode(x, q, refine=40, on_step=done.append)
    assert cost(refined) < cost(plain) and done == list(range(1, 41))
    state = torch.get_rng_state()
    assert torch.equal(refined, model.encode(x, q, refine=40)) and torch.equal(state, torch.get_rng_state())


def test_estimated_bits_are_the_table_bits():
    """What is minimised when only the prior learns, and the frozen tables' cross-entropy, agree within 1 %: little is lost in freezing."""
    model, x = small_autoencoder(), smooth_picture(128, 8)
    model.prior.fit_scale(model.analysis(x, torch.tensor([0])))
    with torch.no_grad():
        for weights in (model.prior.shift, model.prior.near, model.prior.across, model.prior.window):        # some context
            weights.uniform_(0, 1 / weights.shape[0])
    tables = entropy.freeze(model.prior, model.log_step.exp())
    for q in range(6):
        k = model.encode(x, q)
        with torch.no_grad():
            alone = model(x, torch.tensor([q]), prior_only=True)        # no noise, no error
        assert entropy.coded(k[0].numpy(), tables, q).bits == pytest.approx(alone["bpp"].item() * 128 ** 2, rel=0.01) and "mse" not in alone


# Tiles --------------------------------------------------------------------------------------------------

def test_autoencoder_in_tiles_is_exact(autoencoder):
    """The transforms tile by tile, with their receptive field as context, equal those of the whole picture; without it they do not."""
    x, q = torch.rand(1, 3, 480, 416, dtype=torch.float64) * 2 - 1, torch.tensor([3])
    y = autoencoder.analysis(x, q).double()
    for f, given, whole in ((autoencoder.analysis, x, y), (autoencoder.synthesis, y, autoencoder.synthesis(y, q).double())):
        def error(**how):
            tiled = hfd.apply_tiled(lambda window: f(window, q), [given], torch.empty_like(whole), tile=64, **how)
            return (tiled - whole).abs().max() / whole.abs().max()
        assert error() < 1e-5 and error(context=0) > 1e-2               # the transforms return float32


def receptive_radius(denoiser):
    """How far a 16-pixel cell of the denoised picture can see, in pixels: where the gradient of its sum with respect to z is not zero."""
    z = torch.randn(1, 3, 400, 400, dtype=torch.float64, requires_grad=True)
    x = denoiser.predict_x(z, torch.zeros_like(z), torch.tensor([2.0], dtype=torch.float64), torch.tensor([0]))
    x[..., 192:208, 192:208].abs().sum().backward()
    return 192 - z.grad.abs().sum((0, 1)).nonzero().min().item()


def test_receptive_field(denoiser):
    """The U-Net sees at most 128 pixels far, whatever its widths: with that context patches are exact."""
    radius = receptive_radius(denoiser)
    print(f"receptive field radius: {radius} px")
    assert 64 < radius <= 128


def test_patchwise_sampling_is_whole_image_sampling(denoiser):
    """Sampling patch by patch with full context gives the very picture that sampling at once gives; less context does not."""
    x_hat = torch.rand(1, 3, 304, 336, dtype=torch.float64) * 2 - 1
    run = lambda **kw: hfd.sample_picture(denoiser, x_hat, 2, steps=3, sampler="ddpm", seed=5, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hfd, "fast_bf16", lambda device: False)               # float64 throughout
        whole = run(patch=336)
        patches = run(patch=64, context=128)
        assert (patches - whole).abs().max() < 1e-5                     # the network's output is float32
        assert (run(patch=64, context=128, batch=4) - patches).abs().max() < 1e-5
        assert (run(patch=64, context=0) - whole).abs().max() > 1e-3


def test_groups_take_turns(denoiser):
    """In groups, one goes all the way before the next begins, and sees what was made before; one patch alone needs no groups."""
    x_hat = torch.rand(1, 3, 128, 128, dtype=torch.float64) * 2 - 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hfd, "fast_bf16", lambda device: False)
        run = lambda patch, **kw: hfd.sample_picture(denoiser, x_hat, 2, 3, "ddim", 5, patch=patch, **kw)
        assert torch.allclose(run(128, grouped=True), run(128), atol=1e-6)
        visited = []
        original = hfd.apply_tiled
        m.setattr(hfd, "apply_tiled", lambda f, i, out, tile, context, chosen, batch: visited.append(
            [(r, c) for r in (0, 1) for c in (0, 1) if chosen(r, c)]) or original(f, i, out, tile, context, chosen, batch))
        grouped = run(64, grouped=True)
        assert visited == [[(0, 0)]] * 3 + [[(1, 1)]] * 3 + [[(0, 1)]] * 3 + [[(1, 0)]] * 3
        honest, results = hfd.sample, []

        def brighten_the_first(*given):
            results.append(honest(*given))
            if len(results) == 1:
                results[0][..., :64, :64] += 0.5
            return results[-1]
        m.setattr(hfd, "sample", brighten_the_first)
        seen = (run(64, grouped=True) - grouped).abs()[..., 64:, 64:]   # by the second group
        assert seen.max() > 1e-3


# The noise ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_schedule(eta):
    """log SNR falls from +15 to -15; eta = 1 is the cosine schedule; eta shifts it by -2 log eta; alpha^2 + sigma^2 = 1."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    log_snr = hfd.log_snr_at(t, eta)
    assert log_snr[0] == 15 and log_snr[-1] == -15 and (log_snr.diff() <= 0).all()
    alpha, sigma = hfd.alpha_sigma(log_snr)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(101).double())
    inner = slice(5, 96)
    assert torch.allclose(log_snr[inner], hfd.log_snr_at(t, 1.0)[inner] - 2 * math.log(eta))
    if eta == 1.0:
        assert torch.allclose(alpha[inner], torch.cos(math.pi / 2 * t)[inner])
    if eta == 0.5:
        assert alpha[50] == pytest.approx(0.894, abs=1e-3) and sigma[50] == pytest.approx(0.447, abs=1e-3)
    assert hfd.log_snr_at(t.float(), eta).isfinite().all()


def test_velocity_identities(denoiser, monkeypatch):
    """x = alpha z - sigma v and eps = sigma z + alpha v follow from v; so does the flow's target eps - x, whose error is v's times alpha + sigma."""
    x, eps, error = (torch.randn(1, 3, 8, 8, dtype=torch.float64) for _ in range(3))
    log_snr = torch.tensor([1.7], dtype=torch.float64)
    alpha, sigma = hfd.alpha_sigma(log_snr)
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    monkeypatch.setattr(denoiser, "velocity", lambda *asked: hfd.to_planes(v))                  # a network that knows
    assert torch.allclose(denoiser.predict_x(z, x, log_snr, torch.tensor([0])), x)
    flow = lambda v: (sigma - alpha) * z + (alpha + sigma) * v
    assert torch.allclose(sigma * z + alpha * v, eps) and torch.allclose(flow(v), eps - x)
    assert torch.allclose(flow(v + error) - flow(v), (alpha + sigma) * error)


def test_the_flow_weighs_errors_in_its_own_target(monkeypatch):
    """Trained plainly for the flow, an error e in v costs ((alpha + sigma) e)^2, which is the error in eps - x; trained for v, e^2."""
    losses = {}
    for objective in ("v", "flow"):
        model = hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 8), preconditioned=False, objective=objective, eta=1.0))
        rand = torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **how: 0 * rand(*size, **how) + 0.5)   # t = 1/2, where alpha = sigma
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)                              # no noise, so v = -sigma x
        x = torch.ones(1, 3, 32, 32)
        losses[objective] = model(x, x, torch.tensor([0])).item()       # the untrained network says v = 0
        monkeypatch.undo()
    assert losses["v"] == pytest.approx(0.5) and losses["flow"] == pytest.approx(2 * 0.5)       # alpha + sigma = sqrt(2)


def test_closed_form_start():
    """Before training, the preconditioned denoiser is exactly the optimal one for x ~ N(x_hat, s^2): the posterior mean."""
    model = hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 8))).double()
    model.residual_std[:] = torch.linspace(0.02, 0.12, 6)[:, None] * torch.linspace(0.5, 1.5, 12)
    z, x_hat, q = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 3, 16, 16).double(), torch.tensor([1, 4])
    log_snr = torch.tensor([-3.0, 5.0]).double()
    alpha, sigma = (a[:, None, None, None] for a in hfd.alpha_sigma(log_snr))
    s = model.residual_std[q][:, :, None, None]                         # (2, 12, 1, 1): each plane has its own
    correction = alpha * s ** 2 / (alpha ** 2 * s ** 2 + sigma ** 2) * hfd.to_planes(z - alpha * x_hat)
    expected = x_hat + hfd.from_planes(correction)
    assert torch.allclose(model.predict_x(z, x_hat, log_snr, q), expected, atol=1e-6)


def test_loss_starts_at_one():
    """In units of the closed form's standard deviation, Gaussian residuals cost exactly 1 before training: nothing to gain."""
    model = hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 8)))
    model.residual_std[:] = 0.1
    x_hat = torch.zeros(16, 3, 64, 64)
    loss = model(x_hat + 0.1 * torch.randn_like(x_hat), x_hat, torch.arange(16) % 6)
    assert loss.item() == pytest.approx(1.0, abs=0.02)


def test_energy_map():
    """The HFD+ map says in powers of two how much stronger than usual the residual is, and the network is told if it is absent."""
    x, x_hat = torch.zeros(1, 3, 64, 96), torch.zeros(1, 3, 64, 96)
    x[..., :32, :32] = 0.1 * 2                                          # twice the usual deviation: four times the energy
    x[..., 32:, :32] = 0.1
    energy = hfd.residual_energy(x, x_hat, torch.full((1, 12), 0.1), 32)
    assert energy[0, 0].tolist() == [[6, 0, 0], [4, 0, 0]]
    model, seen = hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 8))), []
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0][:, 24:]))     # the map's two planes
    for given in (energy, None, -torch.ones_like(energy)):
        model.predict_x(x, x_hat, torch.zeros(1), torch.tensor([0]), given)
    assert seen[0].shape == (1, 2, 32, 48) and (seen[0][:, 1] == 1).all() and seen[0][0, 0, 0, 0] == 0.5
    assert (seen[1] == 0).all() and (seen[2] == 0).all()


def test_planes_are_a_rotation():
    """The denoiser's planes are an orthonormal change of basis: it can be undone, keeps energies, and leaves white noise white."""
    x = torch.rand(2, 3, 8, 12).double()
    p = hfd.to_planes(x)
    assert p.shape == (2, 12, 4, 6) and torch.allclose(hfd.from_planes(p), x)
    assert p.square().sum() == pytest.approx(x.square().sum().item())
    grey = hfd.to_planes(torch.ones(1, 3, 2, 2))
    assert grey[0, 0].item() == pytest.approx(12 ** 0.5, rel=1e-6) and grey[0, 1:].abs().max() < 1e-6


# The samplers -------------------------------------------------------------------------------------------

def gaussian_denoiser(mean, std):
    """The best denoiser there is for x ~ N(mean, std^2): known in closed form, so that samplers can be tested without training."""
    def predict_x(z, log_snr):
        alpha, sigma = hfd.alpha_sigma(log_snr)
        return mean + alpha * std ** 2 / (alpha ** 2 * std ** 2 + sigma ** 2) * (z - alpha * mean)
    return predict_x


def sampled(sampler, steps, eta, mean=0.3, std=0.1, count=50_000, schedule=hfd.log_snr_at):
    generator = torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(count, generator=generator, dtype=torch.float64)
    return hfd.sample(gaussian_denoiser(mean, std), steps, sampler, lambda t: schedule(t, eta), noise)


@pytest.mark.parametrize("schedule", [hfd.log_snr_at, hfd.flow_log_snr_at])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("eta, tolerance", [(0.1, 0.02), (0.5, 0.04)])
def test_samplers_on_gaussian_data(sampler, eta, tolerance, schedule):
    """On Gaussian data all samplers return its mean and its spread, the more exactly the more steps they take."""
    few, many = (sampled(sampler, steps, eta, schedule=schedule) for steps in (10, 250))
    assert few.mean().item() == pytest.approx(0.3, abs=0.003) and many.mean().item() == pytest.approx(0.3, abs=0.003)
    assert many.std().item() == pytest.approx(0.1, rel=tolerance)
    assert abs(many.std() - 0.1) < abs(few.std() - 0.1)


def test_more_steps_than_the_schedule_has_room_for():
    """With very many steps, or an extreme eta, several fall where log SNR is clamped: nothing moves there, and nothing is divided by it."""
    for schedule in (hfd.log_snr_at, hfd.flow_log_snr_at):
        for steps, eta in ((1000, 0.05), (6, 5e-4), (6, 1000)):
            x = sampled("dpm", steps, eta, count=1000, schedule=schedule)
            assert x.isfinite().all() and x.mean().item() == pytest.approx(0.3, abs=0.02), (steps, eta)


@pytest.mark.parametrize("better, worse, factor", [
    (("ddim", 8, 0.1), ("ddim", 8, 0.02), 1), (("ddim", 8, 0.1), ("ddim", 8, 0.5), 2), (("dpm", 8, 0.1), ("ddim", 20, 0.1), 1)])
def test_what_brings_samples_nearer(better, worse, factor):
    """For a residual of 0.1, eta = 0.1 beats 0.02 and the paper's 0.5; eight second-order steps beat twenty of DDIM. No network is involved."""
    error = lambda how: abs(sampled(*how).std().item() / 0.1 - 1)
    assert factor * error(better) < error(worse) and error(better) < 0.16


def test_euler_on_the_flow_is_ddim():
    """Euler steps along rectified flow's straight line, z' += (s - t) (eps - x), end where DDIM ends on the flow's schedule."""
    predict_x, eta, steps = gaussian_denoiser(0.3, 0.1), 1.0, 12
    z = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start, line = z.clone(), z.clone()
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        log_snr = hfd.flow_log_snr_at(torch.tensor(t, dtype=torch.float64), eta)
        alpha, _ = hfd.alpha_sigma(log_snr)
        clean = torch.sigmoid(log_snr / 2)                                                      # 1 - t, clamped as log_snr is
        x = predict_x(line * alpha / clean, log_snr)                                            # z' scaled to variance 1
        eps = (line - clean * x) / (1 - clean)
        line = line + (s - t) * (eps - x)
    ddim = hfd.sample(predict_x, steps, "ddim", lambda t: hfd.flow_log_snr_at(t, eta), lambda: start)
    assert torch.allclose(line, ddim, atol=2e-3)


def test_ancestral_step_is_the_posterior():
    """One ancestral step, with the true x, has mean and variance of q(z_s | z_t, x) as Bayes' rule gives them."""
    log_snr_t, log_snr_s = torch.tensor(-1.0).double(), torch.tensor(1.5).double()
    (a_t, s_t), (a_s, s_s) = hfd.alpha_sigma(log_snr_t), hfd.alpha_sigma(log_snr_s)
    x, z_t = 0.4, 0.9
    # z_s ~ N(a_s x, s_s^2), and z_t given z_s ~ N(r z_s, s_t^2 - r^2 s_s^2) with r = a_t / a_s. Multiply the two Gaussians.
    r = a_t / a_s
    precision = 1 / s_s ** 2 + r ** 2 / (s_t ** 2 - r ** 2 * s_s ** 2)
    mean = (a_s * x / s_s ** 2 + r * z_t / (s_t ** 2 - r ** 2 * s_s ** 2)) / precision
    z = torch.full((200_000,), z_t, dtype=torch.float64)
    noise = lambda: torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = hfd.ddpm_step(z, torch.full_like(z, x), log_snr_t, log_snr_s, noise)
    assert z.mean().item() == pytest.approx(mean.item(), abs=0.004)
    assert z.var().item() == pytest.approx(1 / precision.item(), rel=0.01)


def test_ddim_is_deterministic_and_seeded(denoiser):
    """All randomness comes from the seed: same seed, same picture; DDIM draws noise once, DDPM at every step."""
    x_hat = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    run = lambda sampler, seed: hfd.sample_picture(denoiser, x_hat, 0, 4, sampler, seed)
    assert torch.equal(run("ddim", 3), run("ddim", 3)) and not torch.equal(run("ddim", 3), run("ddim", 4))
    for sampler, expected in (("ddim", 1), ("ddpm", 4)):
        drawn = []
        hfd.sample(lambda z, l: z * 0, 4, sampler, lambda t: hfd.log_snr_at(t, 0.5), lambda: drawn.append(1) or torch.zeros(4))
        assert len(drawn) == expected


def test_bfloat16_is_used_where_it_pays(monkeypatch):
    """CPUs compute in bfloat16 if theirs is faster than float32: AMD's with AVX-512, any with AMX, but not Intel's with AVX-512 alone."""
    for capabilities, expected in (({}, False), ({"cpu_name": "AMD EPYC"}, False), ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
                                   ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
                                   ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True)):
        monkeypatch.setattr(hfd, "CPU_FEATURES", capabilities)
        assert hfd.fast_bf16(torch.device("cpu")) is expected


def test_the_objective_chooses_its_sampler():
    """A flow model is sampled by Euler steps without being asked to, which are DDIM steps on its schedule; a diffusion model by the second-order solver."""
    x_hat = torch.zeros(1, 3, 32, 32)
    for objective, expected in (("flow", "ddim"), ("v", "dpm")):
        torch.manual_seed(0)
        model = perturbed(hfd.Diffusion(hfd.DiffusionConfig(widths=(8, 12, 16), objective=objective))).float()
        run = lambda **how: hfd.sample_picture(model, x_hat, 0, 4, **how)
        assert torch.equal(run(), run(sampler=expected)) and not torch.equal(run(sampler="dpm"), run(sampler="ddim"))

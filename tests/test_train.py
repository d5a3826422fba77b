"""What train.py promises: it learns, nothing is lost, and mistakes are told in one line."""
import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import contents, refusal

import hfd
import train

TINY = "--batch 4 --crop 32 --device cpu --warmup 5 --log-every 5 --lr 0.003 --images".split()
NETS = {"AutoencoderConfig": {"lambdas": (0.0002, 0.002), "latents": 48, "widths": (8,) * 4,
                              "blocks": (0, 0, 0, 1)},
        "DiffusionConfig": {"widths": (8, 12), "blocks": (1, 1)}}


def shrink(setattr):
    """Give both stages networks that take milliseconds: other defaults for their configurations."""
    for name, defaults in NETS.items():
        fields = [(field, type(value), value) for field, value in defaults.items()]
        setattr(hfd, name, make_dataclass(name, fields, bases=(getattr(hfd, name),)))


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """They are small while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    """A folder of three pictures, one of them small, beside what cannot be read or is hidden."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("deeper", ".thumbnails"):
        (folder / name).mkdir()
        photo.rotate(90).save(folder / name / "b.png")
    photo.save(folder / "a.png")
    small = np.arange(140, dtype=np.uint8).reshape(7, 20)
    Image.fromarray(small).save(folder / "small.png")
    for name in ("broken.jpg", "notes.txt", "phone.heic"):
        (folder / name).write_text("nothing to see")
    (folder / "loop").symlink_to(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stage1(photos, tmp_path_factory):
    """The folder of a tiny model after three steps of stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    run(folder, photos, "--steps 3")
    return folder


@pytest.fixture
def out(tmp_path):
    """Where a run writes to."""
    return tmp_path / "out"


def run(out, photos, words="", stage="autoencoder"):
    """Train on photos (or, if there are none, with the flags in `words` alone), writing to out."""
    train.main([stage, "--out", str(out), *([*TINY, photos] if photos else []), *words.split()])


def at_step(monkeypatch, number, act):
    """From now on, call act() in every run's step of this number."""
    step_done = train.Run.step_done

    def step_done_and_act(run, *arguments):
        step_done(run, *arguments)
        if run.step == number:
            act()
    monkeypatch.setattr(train.Run, "step_done", step_done_and_act)


def saved(folder, part="autoencoder"):
    """(number of steps, the arrays) of a run's own state."""
    about, arrays = hfd.read_archive(folder / f"{part}.training.npz")
    return about["recipe"]["steps"], arrays


def read(path):
    """The pictures there, as training has them."""
    args = argparse.Namespace(images=path, megapixels=100, variety=0.5, seed=0)
    return train.Photos(args, 64, torch.device("cpu"))


def test_dead_leaves_look_like_photographs():
    """Dead leaves lose power with frequency, octave by octave, roughly as photographs do: by
    frequency^-1.5 to frequency^-4.5."""
    rng, power, window = np.random.default_rng(0), 0, np.outer(np.hanning(128), np.hanning(128))
    for _ in range(4):
        grey = train.dead_leaves(128, rng).mean(2)
        power = power + np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    mean = [np.log2(power[(f >= a) & (f < 2 * a)].mean()) for a in (0.03, 0.06, 0.12)]
    assert (-4.5 < np.diff(mean)).all() and (np.diff(mean) < -1.5).all()


def test_any_folder(photos, capsys):
    """Folders are read recursively, hidden ones and links are not; a file that cannot be read is
    named; a picture smaller than the crop is mirrored to size. One picture will do, too."""
    found = read(photos)
    assert len(found.images) == 3 and min(min(p.shape[1:]) for p in found.images) >= 64
    small, = (p for p in found.images if p.shape == (3, 64, 64))
    assert (small[:, 7:14] == small[:, :7].flip(1)).all()
    said = capsys.readouterr().err
    assert "broken.jpg: cannot be read" in said and ".thumbnails" not in said
    assert "phone.heic: skipped" in said and found.description.startswith("3 pictures")
    assert len(read(photos + "/a.png").images) == 1
    for nothing in (photos + "/missing", photos + "/notes.txt"):
        assert "--images" in refusal(read, nothing)


def test_crops_are_as_other_cameras_would_have_them():
    """Colour at half the resolution keeps each pixel's grey and loses the colours' finest detail.
    Another exposure darkens or brightens, but black stays black and white white."""
    crop = 0.3 + 0.4 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    soft = train.varied(crop, 32, True, 1)
    assert torch.allclose(soft.mean(0), crop.mean(0), atol=1e-5)
    energy = hfd.to_planes(torch.stack([crop, soft])).square().mean((2, 3))         # (2, 12)
    detail = energy[:, [5, 6, 7, 9, 10, 11]].sum(1)
    assert detail[1] < 0.2 * detail[0]
    darker, brighter = (train.varied(crop, 48, False, gamma) for gamma in (1.3, 1 / 1.3))
    assert (darker < brighter).all() and darker.shape == (3, 48, 48)
    assert torch.equal(train.varied(crop.round(), 32, False, 1.3), crop.round())


def test_muon_moves_in_every_direction_equally_far():
    """Newton-Schulz steps apply one polynomial to the singular values, again and again, and leave
    the directions alone: as taking the matrix apart would, only cheaper. They come out near 1."""
    G = torch.randn(3, 8, 72, generator=torch.Generator().manual_seed(0)) * 1e-3
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S / S.norm(dim=1, keepdim=True)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S ** 3 + 2.0315 * S ** 5
    rows = train.orthonormal(G)
    assert torch.allclose(rows, U @ torch.diag_embed(S) @ Vh, atol=1e-3)
    assert 0.6 < S.min() and S.max() < 1.25
    weight = torch.nn.Parameter(torch.zeros(8, 8, 3, 3))
    weight.grad = G[0].view(8, 8, 3, 3)
    train.Muon([weight], {"lr": 0.5}).step()
    assert torch.allclose(weight.detach().view(8, 72), -0.5 * rows[0], atol=1e-3)


def test_training_learns(photos, stage1, out):
    """A short training lowers rate + lambda * MSE to the number that is recorded here, and then the
    denoiser's loss below that of the closed form it starts from."""
    run(out, photos, "--steps 60")
    torch.manual_seed(0)
    crops, q, loss = read(photos).crops(16, 64), torch.arange(16) % 2, []
    for folder in (stage1, out):
        torch.manual_seed(0)
        loss.append(hfd.load_model(folder).autoencoder(crops, q)["loss"].mean().item())
    assert loss[1] < 0.99 * loss[0] and loss[1] == pytest.approx(0.981, rel=0.01), loss
    run(out, photos, "--steps 60", "diffusion")
    model, loss = hfd.load_model(out), []
    k = (model.autoencoder.analysis(crops, q) / model.autoencoder.step(q)).round()
    x_hat = model.autoencoder.synthesis(model.autoencoder.dequantize(k, q), q).clamp(-1, 1)
    for _ in range(2):
        torch.manual_seed(0)
        inside, blurry = (t[..., 16:-16, 16:-16] for t in (crops, x_hat))
        loss.append(model.diffusion(inside, q, blurry)["loss"].item())
        for p in model.diffusion.net.head.parameters():
            p.zero_()                                       # leaves the closed form
    assert loss[0] < 0.98 * loss[1] and 0.6 < loss[1] < 1.6, loss


def test_both_stages_make_a_model(photos, stage1, out):
    """Each stage writes its part, with averaged weights, and says how it was made."""
    shutil.copytree(stage1, out)
    run(out, photos, "--kind plain --steps 2", "diffusion")
    model = hfd.load_model(out)
    assert model.identity == hfd.load_model(stage1).identity            # files know of stage 1 only
    assert model.diffusion.config.kind == "plain" and model.diffusion.residual_std.min() > 0
    for part, stage, network in (("autoencoder", "autoencoder", model.autoencoder),
                                 ("denoiser", "diffusion", model.diffusion)):
        recipe, (steps, arrays) = model.recipes[part], saved(out, part)
        assert recipe["steps"] == steps and recipe["data"].startswith("3 pictures")
        assert recipe["commands"][0].startswith(f"python train.py {stage} ")
        for name, t in network.state_dict().items():
            assert np.allclose(t, arrays[f"average.{name}"], rtol=1e-3, atol=1e-6)
        assert (arrays[f"average.{name}"] != arrays[f"model.{name}"]).any()     # the last step's


def test_a_prior_can_be_learned_alone(photos, stage1, out):
    """Part I's prior in place of Part II's: pictures stay, only the bits for them change."""
    run(out, photos, f"--init {stage1} --prior factorized --steps 2")
    before, after = (hfd.load_model(folder).autoencoder.state_dict() for folder in (stage1, out))
    assert all(torch.equal(after[name], t) for name, t in before.items() if name[:5] != "prior")
    assert not torch.equal(after["prior.octaves"], before["prior.octaves"])
    assert "prior.near" in before and "prior.near" not in after


def test_what_ships_can_be_trained_on(photos, stage1, out, tmp_path):
    """--init starts from finished networks, and may make a flow of a denoiser: after one step at
    hardly any learning rate, they still are those. What has no denoiser is refused."""
    flow, how = shutil.copytree(stage1, tmp_path / "flow"), "--steps 1 --lr 1e-9 --init"
    run(out, photos, f"{how} {stage1}")
    to_flow = flow, photos, f"--objective flow {how} {out}", "diffusion"
    assert "no denoiser" in refusal(run, *to_flow)
    run(out, photos, "--eta 0.3 --steps 2", "diffusion")
    run(*to_flow)
    old, new, flow = (hfd.load_model(folder) for folder in (stage1, out, flow))
    config = flow.diffusion.config
    assert (config.objective, config.eta, config.kind) == ("flow", 0.3, "plus")
    for before, after in (old.autoencoder, new.autoencoder), (new.diffusion, flow.diffusion):
        for a, b in zip(before.parameters(), after.parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("stage, part", [("autoencoder", "autoencoder"), ("diffusion", "denoiser")])
def test_resume_is_bit_for_bit(stage, part, photos, stage1, tmp_path, monkeypatch):
    """Stopping and resuming gives, bit for bit, what a run gives that never stopped: random numbers
    are a function of the step. So is stage 2's pool of pairs, half of which is used here."""
    monkeypatch.setattr(train, "POOL", 4)
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    for out in (straight, halved) if stage == "diffusion" else ():
        out.mkdir()
        shutil.copy(stage1 / "autoencoder.npz", out)
    run(straight, photos, "--steps 12", stage)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        run(halved, photos, "--steps 12", stage)
    run(halved, None, "--resume", stage)                    # no flags: they are known
    (steps, once), (_, twice) = saved(straight, part), saved(halved, part)
    assert steps == 12 and any(name.startswith("optimizer") for name in once)
    assert once.keys() == twice.keys()
    assert all(np.array_equal(a, twice[name]) for name, a in once.items())
    commands = hfd.load_model(halved).recipes[part]["commands"]         # all that had a part in it
    assert len(commands) == 2 and commands[1].endswith("--resume")


@pytest.mark.parametrize("cause, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("pipe", 1),
    *[("disk", 1)] * os.path.exists("/dev/full")])                      # which only Linux has
def test_whatever_ends_a_run_the_steps_are_saved(cause, status, photos, out, monkeypatch, capsys):
    """Ctrl-C, a batch queue's end, a closed terminal, a full disk or a closed pipe: the run stops
    after the step that it is in, saves, says so on stderr, and exits with a status of its own."""
    def happen():
        if isinstance(cause, int):
            return signal.raise_signal(cause)
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", open("/dev/full" if cause == "disk" else writer, "w"))
    if isinstance(cause, int):                              # nohup and a shell's & may ignore it
        signal.signal(cause, signal.default_int_handler)
    at_step(monkeypatch, 4, happen)
    with pytest.raises(SystemExit) as caught:
        run(out, photos, "--steps 90")
    steps = 4 if isinstance(cause, int) else 5              # the next line of progress is step 5's
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped at step {steps}; saved" in said and "--resume" in said
    assert saved(out)[0] == hfd.load_model(out).recipes["autoencoder"]["steps"] == steps
    assert caught.value.code == status


def test_nan_stops_with_a_message(stage1, out, monkeypatch):
    """A loss that is not a number ends a run in words, and nothing is saved then."""
    shutil.copytree(stage1, out)
    before, forward = contents(out), hfd.Autoencoder.forward
    monkeypatch.setattr(hfd.Autoencoder, "forward", lambda model, x, q: {
        name: value * np.nan for name, value in forward(model, x, q).items()})
    said = refusal(run, out, None, "--resume --steps 9")
    assert "the loss is nan" in said and "lower --lr" in said and contents(out) == before


def test_what_is_there_is_not_overwritten(photos, stage1, out):
    """Training over a model is refused, as are settings that cannot be."""
    before = contents(stage1)
    assert "--resume continues it" in refusal(run, stage1, photos)
    assert contents(stage1) == before
    for words in ("--lr nan", "--crop 100", "--steps 0", "--megapixels nan", "--variety 2"):
        assert words.split()[0] in refusal(run, out, None, words)
    assert "no such file" in refusal(run, out, None, "--resume") and not out.exists()
    assert "autoencoder.npz" in refusal(run, out, photos, "", "diffusion")
    assert not list(out.iterdir())


def test_damage_cannot_be_resumed(stage1, out):
    """What is missing of a run's state or of the wrong kind is refused, and the files stay."""
    shutil.copytree(stage1, out)
    path = out / "autoencoder.training.npz"
    (about, arrays), name = hfd.read_archive(path), "optimizer.exp_avg.log_step"
    wrong = {"settings": 3}, {"steps": "x"}, {"minutes": None}, {"commands": 5}
    states = [({"recipe": about["recipe"] | one}, arrays) for one in wrong]
    states += [({"recipe": None}, arrays), (about, arrays | {name: np.ones(3, np.float32)}),
               (about, {other: a for other, a in arrays.items() if other != name})]
    for state in states:
        hfd.write_archive(path, *state)
        before = contents(out)
        assert path.name in refusal(run, out, None, "--resume") and contents(out) == before


def test_two_processes_train_together(photos, out, monkeypatch, capsys):
    """Two processes, as torchrun starts them, train one model; one of them writes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # It leaves without Python's last clean-up, in which PyTorch's threads abort once in a while.
    script = ("import os, sys, test_train as t; t.shrink(setattr); t.train.Run.end = lambda run: "
              "print(run.average.log_step.sum().item(), flush=True); t.run(*sys.argv[1:]); "
              "os._exit(0)")
    own = {"RANK": "1", "PYTHONPATH": str(Path(__file__).parent)}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    words = out, photos, "--steps 6"
    other = subprocess.Popen([sys.executable, "-c", script, *words], env=os.environ | own,
                             text=True, stdout=subprocess.PIPE)
    run(*words)
    said, (steps, arrays) = other.communicate(timeout=60)[0], saved(out)
    assert "step" not in said and other.returncode == 0
    assert "finished at step 6" in capsys.readouterr().out and steps == 6
    theirs, ours = float(said.split()[-1]), arrays["average.log_step"].sum()
    assert theirs == pytest.approx(ours, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains(photos, out, monkeypatch, capsys):
    """The same commands train on a GPU, the fourth step on recorded, and the model loads on a CPU.
    A resumed run goes on."""
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay",
                        lambda graph: replays.append(graph) or replay(graph))
    for stage in ("autoencoder", "diffusion"):
        run(out, photos, "--steps 6 --device cuda", stage)
        run(out, None, "--steps 16 --resume", stage)
        assert "recorded" not in capsys.readouterr().err
    assert hfd.load_model(out).diffusion and len(replays) > 10

"""What train.py promises: it learns, nothing is lost when it is interrupted, and mistakes are told
in one line."""
import fcntl
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

import hfd
import sample
import train

TINY = "--batch 4 --crop 32 --device cpu --warmup 5 --log-every 5 --lr 0.003 --images".split()
NETS = {"AutoencoderConfig": {"lambdas": (0.0002, 0.002), "latents": 48, "widths": (8, 8, 8, 8),
                              "blocks": (0, 0, 0, 1)},
        "DiffusionConfig": {"widths": (8, 12), "blocks": (1, 1)}}


def shrink(setattr):
    """Give both stages networks that take milliseconds: other defaults for their configurations."""
    for name, defaults in NETS.items():
        fields = [(field, type(value), value) for field, value in defaults.items()]
        setattr(hfd, name, make_dataclass(name, fields, bases=(getattr(hfd, name),)))


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """Small networks, and the signals as they were when all is over."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    """A folder of three pictures, one in a subfolder, one smaller than any crop, beside what is no
    picture, cannot be read, or is hidden."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("deeper", ".thumbnails"):
        (folder / name).mkdir()
        photo.rotate(90).save(folder / name / "b.png")
    photo.save(folder / "a.png")
    Image.new("L", (20, 7), 90).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    for name in ("notes.txt", "phone.heic"):
        (folder / name).write_text("nothing to see")
    (folder / "loop").symlink_to(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stage1(photos, tmp_path_factory):
    """The folder of a tiny model after three steps of stage 1."""
    folder = str(tmp_path_factory.mktemp("stage1"))
    train.main(["autoencoder", "--steps", "3", "--out", folder, *TINY, photos])
    return folder


@pytest.fixture
def out(tmp_path):
    """Where a run writes to."""
    return tmp_path / "out"


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


def everything(folder):
    """{name: bytes} of the files in a folder."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def read(path, seed=0):
    """The pictures there, as training has them."""
    return train.Photos(path, 64, torch.device("cpu"), 100, 0.5, seed)


# What is learned from, and how --------------------------------------------------------------------


def test_dead_leaves_look_like_photographs():
    """Dead leaves share the photographs' power spectrum, about 1 / frequency^2: that is why one can
    learn from them."""
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
    printed = capsys.readouterr()
    assert found.description.startswith("3 pictures")
    assert "broken.jpg: cannot be read" in printed.err
    assert "phone.heic: skipped" in printed.err and ".thumbnails" not in printed.err
    crops = found.crops(5, 64)
    assert crops.shape == (5, 3, 64, 64) and -1 <= crops.min() and crops.max() <= 1
    assert len(read(photos + "/a.png").images) == 1
    for nothing in (photos + "/missing", photos + "/notes.txt"):
        with pytest.raises(hfd.HFDError, match="--images"):
            read(nothing)


def test_crops_are_as_other_cameras_would_have_them():
    """Colour at half the resolution keeps each pixel's grey and loses the colours' finest detail.
    Another exposure darkens or brightens, but black stays black and white white."""
    crop = 0.3 + 0.4 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    soft = train.varied(crop, 32, True, 1)
    assert torch.allclose(soft.mean(0), crop.mean(0), atol=1e-5)
    energy = hfd.to_planes(torch.stack([crop, soft])).square().mean((2, 3))         # (2, 12)
    detail = energy[:, [5, 6, 7, 9, 10, 11]].sum(1)
    assert detail[1] < 0.2 * detail[0] and torch.equal(train.varied(crop, 32, False, 1), crop)
    for size in (24, 48):
        assert train.varied(crop, size, True, 1).shape == (3, size, size)
    darker, brighter = (train.varied(crop, 32, False, gamma) for gamma in (1.3, 1 / 1.3))
    assert (darker < crop).all() and (brighter > crop).all()
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
    train.Muon([{"params": [weight], "lr": 0.5}]).step()
    assert torch.allclose(weight.detach().view(8, 72), -0.5 * rows[0], atol=1e-3)


RECORDED_LOSS = 0.968       # of the next test; bfloat16 moves it by less than the tolerance


def test_training_learns(photos, stage1, out, capsys):
    """A short training lowers rate + lambda * MSE on the same crops to the number recorded here; a
    line of progress names what it counts."""
    train.main(["autoencoder", "--steps", "60", "--out", str(out), *TINY, photos])
    line = next(line for line in capsys.readouterr().out.splitlines() if "step     20/60" in line)
    assert {"loss", "bpp", "PSNR", "steps/s", "left"} <= set(line.split())
    torch.manual_seed(0)
    crops, q, loss = read(photos).crops(16, 64), torch.arange(16) % 2, []
    for folder in (stage1, out):
        torch.manual_seed(0)
        loss.append(hfd.load_model(folder).autoencoder(crops, q)["loss"].mean().item())
    assert loss[1] < 0.99 * loss[0] and loss[1] == pytest.approx(RECORDED_LOSS, rel=0.01), loss


def test_both_stages_make_a_model(photos, stage1, out):
    """Each stage writes its part of the model, which loads without flags and says how it was made:
    averaged weights, matrices in half precision. Files do not know of stage 2."""
    shutil.copytree(stage1, out)
    train.main(["diffusion", "--kind", "plain", "--steps", "2", "--out", str(out), *TINY, photos])
    model = hfd.load_model(out)
    assert model.identity == hfd.load_model(stage1).identity
    assert model.diffusion.config.kind == "plain" and model.diffusion.residual_std.min() > 0
    for part, stage, network in (("autoencoder", "autoencoder", model.autoencoder),
                                 ("denoiser", "diffusion", model.diffusion)):
        recipe, (steps, arrays) = model.recipes[part], saved(out, part)
        assert recipe["steps"] == steps == (3 if part == "autoencoder" else 2)
        assert recipe["commands"][0].startswith(f"python train.py {stage} ")
        assert recipe["data"].startswith("3 pictures")
        for name, t in network.state_dict().items():
            assert np.allclose(t, arrays[f"average.{name}"], rtol=1e-3, atol=1e-6)


def test_a_prior_can_be_learned_alone(photos, stage1, out):
    """Part I's prior in place of Part II's: the pictures stay what they are, only which bits stand
    for them changes."""
    words = f"autoencoder --init {stage1} --prior factorized --steps 2 --out {out}".split()
    train.main([*words, *TINY, photos])
    before, after = (hfd.load_model(folder).autoencoder.state_dict() for folder in (stage1, out))
    assert all(torch.equal(after[name], t) for name, t in before.items() if name[:5] != "prior")
    assert not torch.equal(after["prior.octaves"], before["prior.octaves"])
    assert "prior.near" in before and "prior.near" not in after


def test_a_denoiser_can_be_finetuned(photos, stage1, out, tmp_path):
    """--init starts from a finished denoiser, here to make a flow of it: after one step at hardly
    any learning rate, it still is that one. What has no denoiser, or another kind, is refused."""
    def start(source, name, *words):
        shutil.copytree(stage1, tmp_path / name)
        train.main(["diffusion", "--init", str(source), *words, "--steps", "1", "--lr", "1e-9",
                    "--out", str(tmp_path / name), *TINY[:-3], "--images", photos])
        return hfd.load_model(tmp_path / name).diffusion
    shutil.copytree(stage1, out)
    train.main(["diffusion", "--eta", "0.3", "--steps", "2", "--out", str(out), *TINY, photos])
    before, after = hfd.load_model(out).diffusion, start(out, "flow", "--objective", "flow")
    assert (after.config.objective, after.config.eta, after.config.kind) == ("flow", 0.3, "plus")
    for a, b in zip(before.parameters(), after.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)
    with pytest.raises(hfd.HFDError, match="kind"):
        start(out, "plain", "--kind", "plain")
    with pytest.raises(hfd.HFDError, match="denoiser"):
        start(stage1, "nothing")


# Stopping and going on ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage, part", [("autoencoder", "autoencoder"), ("diffusion", "denoiser")])
def test_resume_is_bit_for_bit(stage, part, photos, stage1, tmp_path, monkeypatch):
    """Stopping and resuming gives, bit for bit, what a run gives that never stopped: random numbers
    are a function of the step. So is the pool of pairs that stage 2 draws from; here a run stops
    with half of a pool used, and goes on into the larger crops of the last quarter."""
    monkeypatch.setattr(train, "POOL", 4)
    arrays = []
    for name in ("straight", "halved"):
        (out := tmp_path / name).mkdir()
        if stage == "diffusion":
            shutil.copy(f"{stage1}/autoencoder.npz", out)
        words = [stage, "--out", str(out), "--steps", "12", *TINY, photos]
        if name == "halved":
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
                train.main(words)
            words = [stage, "--out", str(out), "--resume"]              # no flags: they are known
        train.main(words)
        steps, found = saved(out, part)
        arrays.append(found)
        assert steps == 12 and any(name.startswith("optimizer") for name in found)
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(a, arrays[1][name]) for name, a in arrays[0].items())
    commands = hfd.load_model(out).recipes[part]["commands"]            # all that had a part in it
    assert len(commands) == 2 and commands[1].endswith("--resume")


@pytest.mark.parametrize("cause, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("disk", 1), ("pipe", 1)])
def test_whatever_ends_a_run_the_steps_are_saved(cause, status, photos, out, monkeypatch, capsys):
    """Ctrl-C, a batch queue's end, a closed terminal, a full disk or a closed pipe where the
    progress goes: the run stops after the step that it is in, saves, says so on stderr, and exits
    with a status that says so, too."""
    def happen():
        if isinstance(cause, int):
            return signal.raise_signal(cause)
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", open("/dev/full" if cause == "disk" else writer, "w"))
    at_step(monkeypatch, 4, happen)
    with pytest.raises(SystemExit) as caught:
        train.main(["autoencoder", "--steps", "90", "--out", str(out), *TINY, photos])
    steps = 4 if isinstance(cause, int) else 5              # the next line of progress is step 5's
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped at step {steps}; saved" in said and "--resume" in said
    assert saved(out)[0] == hfd.load_model(out).recipes["autoencoder"]["steps"] == steps
    assert caught.value.code == status


def test_a_disk_that_fills_up_spoils_nothing(photos, out, monkeypatch):
    """If saving fails, one line says why; what was saved before is whole, and nothing left over."""
    def fsync(f):
        raise OSError(28, os.strerror(28))
    at_step(monkeypatch, 3, lambda: monkeypatch.setattr(os, "fsync", fsync))
    with pytest.raises(hfd.HFDError, match="No space left"):
        train.main(["autoencoder", "--save-every", "2", "--out", str(out), *TINY, photos])
    assert sorted(everything(out)) == ["autoencoder.npz", "autoencoder.training.npz"]
    assert saved(out)[0] == hfd.load_model(out).recipes["autoencoder"]["steps"] == 2


def test_going_on_from_what_ships(stage1, out, capsys):
    """Without its own state, as in a model from elsewhere, a run goes on from averaged weights."""
    out.mkdir()
    shutil.copy(f"{stage1}/autoencoder.npz", out)
    train.main(["autoencoder", "--resume", "--steps", "4", "--out", str(out)])
    assert "averaged weights" in capsys.readouterr().out and saved(out)[0] == 4


@pytest.mark.parametrize("ill", ["loss", "gradient"])
def test_nan_stops_with_a_message(ill, stage1, out, monkeypatch):
    """A loss or gradient that is not a number ends a run in words, and nothing is saved then."""
    shutil.copytree(stage1, out)
    before, clip, forward = everything(out), torch.nn.utils.clip_grad_norm_, hfd.Autoencoder.forward
    if ill == "loss":
        monkeypatch.setattr(hfd.Autoencoder, "forward", lambda model, x, q: {
            name: value * np.nan for name, value in forward(model, x, q).items()})
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) * np.inf)
    with pytest.raises(hfd.HFDError, match="(loss is nan|gradient inf).*lower --lr"):
        train.main(["autoencoder", "--out", str(out), "--resume", "--steps", "9"])
    assert everything(out) == before


def test_what_is_there_is_not_overwritten(photos, stage1, tmp_path):
    """Training anew over a model is refused, as are settings that no training could have, before
    anything is written. A folder that another run writes to is left to it."""
    before, new = everything(stage1), tmp_path / "new"
    for words in (f"autoencoder --out {stage1}", "autoencoder --lr nan", "autoencoder --crop 100",
                  "autoencoder --steps 0", "autoencoder --megapixels nan", "diffusion --eta inf",
                  "autoencoder --resume", "diffusion --resume"):
        with pytest.raises(hfd.HFDError, match=f"{words.split()[1]}|--resume|no such file"):
            train.main([words.split()[0], "--out", str(new), *words.split()[1:]])
        assert not new.exists()
    assert everything(stage1) == before
    new.mkdir()
    with pytest.raises(hfd.HFDError, match="autoencoder"):
        train.main(["diffusion", "--out", str(new), *TINY, photos])
    folder = os.open(new, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(hfd.HFDError, match="another run"):
        train.main(["autoencoder", "--out", str(new), *TINY, photos])
    os.close(folder)
    assert not list(new.iterdir())


def test_damage_cannot_be_resumed(stage1, out):
    """Whatever is missing of a run's state, or of the wrong kind, --resume refuses it in one line,
    and leaves the files alone."""
    shutil.copytree(stage1, out)
    path = out / "autoencoder.training.npz"
    whole, (about, arrays) = path.read_bytes(), hfd.read_archive(path)
    recipe, names = about["recipe"], [f"{part}.log_step" for part in (
        "model", "average", "optimizer.exp_avg")]
    wrong = [recipe | one for one in (
        {"settings": recipe["settings"] | {"save_every": 0}}, {"settings": 3}, {"steps": "x"},
        {"minutes": None}, {"commands": 5})] + [[1], None]
    states = [(about | {"recipe": part}, arrays) for part in wrong] + [({}, arrays)]
    states += [(about, arrays | {name: np.ones(3, np.float32)}) for name in names]
    states += [(about, {k: a for k, a in arrays.items() if k != name}) for name in names[:2]]
    for state in (*states, whole[:-100], whole[:len(whole) // 2]):
        path.write_bytes(state) if isinstance(state, bytes) else hfd.write_archive(path, *state)
        before = everything(out)
        with pytest.raises(hfd.HFDError) as caught:
            train.main(["autoencoder", "--out", str(out), "--steps", "4", "--resume"])
        assert len(str(caught.value).splitlines()) == 1 and everything(out) == before


# In processes of their own ------------------------------------------------------------------------


def start(words, env={}, **options):
    """A training process with tiny networks."""
    script = ("import sys; sys.path[:0] = sys.argv.pop(1), sys.argv.pop(1); import test_train as t;"
              "t.shrink(setattr); t.torch.set_num_threads(1); t.sample.run(t.train.main)")
    paths = [str(Path(module).parent) for module in (train.__file__, __file__)]
    return subprocess.Popen([sys.executable, "-c", script, *paths, *words], text=True,
                            env=os.environ | env, **options)


def test_a_pipe_that_closes_early(photos, out):
    """`python train.py ... | head -2`, as the shell sees it: exit status 1, one line, no loss."""
    pipe, images = subprocess.PIPE, photos + "/a.png"
    process = start(["autoencoder", "--steps", "100000", "--out", str(out), *TINY, images],
                    stdout=pipe, stderr=pipe)
    assert "picture" in process.stdout.readline() and "step" in process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1 and said.startswith(f"stopped at step {saved(out)[0]};")
    assert said.count("\n") == 1 and "--resume" in said


def test_two_processes_train_together(photos, out, monkeypatch, capsys):
    """Two processes, as torchrun starts them, train one model; one of them writes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port} for n in (0, 1)]
    words = ["autoencoder", "--steps", "6", "--out", str(out), *TINY, photos]
    other = start(words, ranks[1], stdout=subprocess.PIPE)
    for name, value in ranks[0].items():
        monkeypatch.setenv(name, value)
    train.main(words)
    assert "step" not in other.communicate(timeout=60)[0] and other.returncode == 0
    assert "finished at step 6" in capsys.readouterr().out and saved(out)[0] == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains(photos, out):
    """The same commands train on a GPU, and the model loads on a CPU."""
    for stage in ("autoencoder", "diffusion"):
        train.main([stage, "--steps", "5", "--out", str(out), *TINY, photos, "--device", "cuda"])
    assert hfd.load_model(out).diffusion

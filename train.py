"""Learning: both stages, from any folder of pictures, on a GPU or a laptop.

    python train.py autoencoder --images PHOTOS --out runs/mine
    python train.py diffusion --images PHOTOS --out runs/mine

Each stage writes its part of the model in runs/mine at every save, ready to use (sample.py --model
runs/mine), and beside it, in NAME.training.npz, what --resume needs. Without --images both train on
*dead leaves* that this file draws itself, so nothing needs to be downloaded. Any run can be stopped
(Ctrl-C, or worse) and continued with --resume, and ends where it would have ended uninterrupted (on
a CPU, bit for bit). With several GPUs: torchrun --nproc_per_node N train.py ...
"""
import argparse
import contextlib
import copy
import fcntl
import math
import os
import platform
import resource
import shlex
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw

import entropy
import hfd
import sample
from hfd import HFDError

# Pictures to learn from ---------------------------------------------------------------------------


def dead_leaves(size, rng):
    """A dead leaves picture, uint8 (size, size, 3): discs that fall on one another until nothing
    shows through. rng: a NumPy Generator.

    The simplest model of why photographs look as they do (Lee, Mumford & Huang 2001): the world is
    made of objects that hide each other, in all sizes: the radius r has the density r^-3. Drawn at
    twice the size, then halved, for smooth edges."""
    big = 2 * size
    canvas = Image.new("RGB", (big, big))
    draw = ImageDraw.Draw(canvas)
    smallest, largest = 6.0, big / 2
    # A disc's mean area is 2 pi smallest^2 log(largest / smallest). Ten times the canvas in all
    # leaves e^-10 of it bare.
    area = 2 * math.pi * smallest ** 2 * math.log(largest / smallest)
    for u, x, y, grey, *others in rng.random((int(10 * (1.2 * big) ** 2 / area), 6)):
        # Inverse transform sampling: if u is uniform, this radius has density ~ r^-3.
        r = (smallest ** -2 + u * (largest ** -2 - smallest ** -2)) ** -0.5
        x, y = (x * 1.2 - 0.1) * big, (y * 1.2 - 0.1) * big
        # A shade of grey: red follows it closely, green and blue stray.
        colour = tuple(int(255 * min(max(grey + 0.3 * (c - 0.5), 0), 1)) for c in (grey, *others))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return np.asarray(canvas.resize((size, size), Image.BOX))


# What people compress comes from cameras as it is: soft, with half the colour resolution, well or
# badly exposed. Photographs that were reduced to train on are crisp to the last pixel, in colour
# too, and a denoiser that has seen only these puts coloured specks into others. So a share of the
# crops is varied: resized by a factor of ZOOM, and as often, but each by itself, ...
ZOOM = (0.7, 1.5)
GAMMA = 0.3             # ... exposed anew, by an exponent within exp(+-GAMMA)


def varied(crop, size, soft_colour, gamma):
    """A window (3, h, h) in [0, 1] as another camera might have given it, (3, size, size): resized,
    with colour at half the resolution or not, and exposed anew."""
    crop = crop[None]                                                           # (1, 3, h, h)
    if crop.shape[2] != size:
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
    if soft_colour:
        grey = crop.mean(dim=1, keepdim=True)                                   # (1, 1, size, size)
        colour = F.avg_pool2d(crop - grey, 2)                                  # (1, 3, size / 2, .)
        crop = grey + F.interpolate(colour, scale_factor=2, mode="bilinear")    # (1, 3, size, size)
    return crop[0].clamp(0, 1) ** gamma


def picture_files(folder):
    """The paths of all pictures in a folder and those below it, sorted, or of the one picture that
    is named. Hidden ones (thumbnails, mostly) are left out, and links to folders not followed."""
    if os.path.isfile(folder):
        return [Path(folder)]
    found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in found:
        if path.suffix.lower() in (".heic", ".heif", ".dng", ".cr2", ".nef"):
            print(f"note: {path}: skipped, for Pillow cannot read it", file=sys.stderr)
    return [path for path in found if path.suffix.lower() in Image.registered_extensions()]


class Photos:
    """Every picture of a folder, decoded once and kept as uint8 on the device that trains: decoding
    on the fly is what usually starves a GPU, and a few hundred photographs fit into memory.

    Bad files are named and skipped; pictures with a side below `smallest` are continued by
    mirroring; reading stops, and says so, at `megapixels`. HFDError if nothing is left."""

    def __init__(self, folder, smallest, device, megapixels, variety, seed):
        self.variety = variety
        self.images, total, rng = [], 0, np.random.default_rng(seed)
        names = picture_files(folder) if folder else [None] * 64
        rng.shuffle(names)
        for name in names:
            try:
                array = np.array(sample.open_picture(name)[0]) if name else dead_leaves(256, rng)
            except HFDError as error:
                print(f"warning: {error}; skipped", file=sys.stderr)
                continue
            pad = [(0, max(0, smallest - side)) for side in array.shape[:2]] + [(0, 0)]
            array = np.pad(array, pad, mode="symmetric")                            # (H, W, 3)
            self.images.append(torch.from_numpy(array).permute(2, 0, 1).contiguous().to(device))
            total += array.shape[0] * array.shape[1] / 1e6
            if total > megapixels:
                print(f"warning: read only {total:.0f} megapixels; see --megapixels",
                      file=sys.stderr)
                break
        if not self.images:
            raise HFDError(f"{folder}: no pictures found there; name another folder with --images, "
                           "or none to train on dead leaves")
        kind = "pictures" if folder else "dead leaves"
        self.description = f"{len(self.images)} {kind}, {total:.0f} megapixels"

    def crops(self, count, size):
        """Random crops (count, 3, size, size) in [-1, 1], a share of them `varied`, each mirrored
        half of the time. Uses torch's global seed."""
        batch, share = [], self.variety
        for n, i, j, zoom, soft, light, mirror in torch.rand(count, 7).tolist():
            image = self.images[int(n * len(self.images))]                      # (3, H, W)
            factor = ZOOM[0] * (ZOOM[1] / ZOOM[0]) ** (zoom / share) if zoom < share else 1
            gamma = math.exp(GAMMA * (2 * light / share - 1)) if light < share else 1
            side = min(round(size / factor), *image.shape[1:])
            i, j = int(i * (image.shape[1] - side + 1)), int(j * (image.shape[2] - side + 1))
            crop = image[:, i:i + side, j:j + side].float() / 255               # (3, side, side)
            crop = varied(crop, size, soft < share, gamma)                      # (3, size, size)
            batch.append(crop.flip(2) if mirror < 0.5 else crop)
        return torch.stack(batch) * 2 - 1


# Optimizers ---------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for the convolutions inside the blocks.

    A gradient of a matrix is dominated by a few directions, and so is a step along it; the others,
    which may matter as much, hardly move. So take the nearest matrix with orthonormal rows instead,
    U V^T if the momentum is U S V^T: every direction moves equally far."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        """Update each parameter (outputs, inputs, 3, 3) by its gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].mul_(0.95).add_(p.grad)
                ahead = p.grad + 0.95 * momentum                                    # Nesterov's
                by_shape.setdefault(p.shape, []).append((p, ahead))
            for shape, pairs in by_shape.items():           # those of one shape at once
                steps = torch.stack([ahead.reshape(shape[0], -1) for _, ahead in pairs])
                for (p, _), step in zip(pairs, orthonormal(steps)):
                    p.sub_(step.view(shape), alpha=group["lr"])


def orthonormal(matrices):
    """The nearest matrices with orthonormal rows, nearly: (G G^T)^(-1/2) G of each G in (n, rows,
    columns), rows <= columns.

    Five Newton-Schulz steps. Each applies to the singular values a polynomial that pulls them
    towards 1: x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5. As it is odd, all of it can be done on the
    small G G^T, which costs a third of the usual way."""
    G = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)             # (n, rows, columns)
    gram = G @ G.mT                                                                # (n, rows, rows)
    one = torch.eye(gram.shape[1], device=G.device)
    root = one                                                                      # gram^(-1/2)
    for _ in range(5):
        p = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        root, gram = p @ root, p @ gram @ p
    return root @ G


# The loop that both stages share ------------------------------------------------------------------


def fit(run, batch_loss):
    """Minimise batch_loss(step, crop size, batch size) -> {"loss": ..., other named scalars}.

    Every random number of step n comes from the seed and n alone. So a saved run need not hold any
    random state, and a resumed one sees the very crops and noise that it would have seen."""
    args, model, device = run.args, run.model, run.device
    bf16 = hfd.fast_bf16(device)
    while run.goes_on():
        step = run.step
        run.seed(step)
        # The last quarter sees crops of twice the side, and a quarter as many: what the net learns
        # near a crop's border, where it lacks context, then weighs less.
        late = step >= 0.75 * args.steps
        size, batch = (2 * args.crop, max(1, args.batch // 4)) if late else (args.crop, args.batch)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        rate = min(1, (step + 1) / args.warmup) * cosine
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = batch_loss(step, size, batch)
        terms["loss"].backward()
        run.share_gradients()
        terms["gradient"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
        run.step_done(batch * size ** 2, terms)
    run.end()


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP      # Ctrl-C, a batch queue, a closed laptop


class Run:
    """What surrounds the loop: seeds, saving and resuming, progress, signals, several GPUs.

    `step` counts the steps done; `status`: 0, or what to exit with. part: what the files are
    called, "autoencoder" or "denoiser". photos: what the recipe tells of. more: what else to write
    into what ships."""

    def __init__(self, args, part, device, model, optimizers, photos, **more):
        self.args, self.device, self.model, self.optimizers = args, device, model, optimizers
        self.photos, self.more, self.world = photos, more, int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.part = Path(args.out, part + ".npz")
        self.state = self.part.with_suffix(".training.npz")
        # The average of the weights over the last tenth of all steps is a better model than those
        # of any one step (a memory that grows with training: Karras et al. 2024, section 3.1).
        self.average = copy.deepcopy(model)
        self.step, self.pixels, self.minutes, self.status = 0, 0, 0.0, 0
        if args.resume:
            self.load()
        self.say(photos.description)
        self.seen, self.begin, self.mark = [], time.time(), time.time()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.stop)

    def stop(self, number, frame=None):
        """A signal ends the loop after the step that it is in."""
        self.status = self.status or 128 + number

    def seed(self, number):
        """Seed everything random anew for this number, differently on each GPU."""
        torch.manual_seed((self.args.seed * 1_000_003 + number) * self.world + self.rank)

    def goes_on(self):
        """Whether there is another step to take. All GPUs must leave the loop at the same one."""
        stop = self.status
        if self.world > 1:
            stop = torch.tensor(stop, device=self.device)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        return self.step < self.args.steps and not stop

    def share_gradients(self):
        """Average them over all GPUs."""
        for p in self.model.parameters() if self.world > 1 else ():
            dist.all_reduce(p.grad.div_(self.world))

    def step_done(self, pixels, terms):
        """Count a step and average the weights; now and then tell of it and save."""
        self.step, self.pixels = self.step + 1, self.pixels + pixels * self.world
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()),
                                 10 / (self.step + 10))
        # Numbers stay on the device until a line wants them: a GPU that is asked after every step
        # waits after every step.
        self.seen.append({name: value.detach() for name, value in terms.items()})
        first, last = self.step == 1, self.step == self.args.steps
        if first or last or self.step % self.args.log_every == 0:
            self.tell()
        if not last and (first or self.step % self.args.save_every == 0):
            self.save()                                 # from step 1 on there is what to --resume

    def tell(self):
        """A line of progress, with means since the last one. HFDError if one is not a number."""
        means = {name: torch.stack([terms[name] for terms in self.seen]).mean().item()
                 for name in self.seen[0]}
        if not all(map(math.isfinite, means.values())):
            raise HFDError(f"the loss is {means['loss']}, the gradient {means['gradient']} after "
                           f"{self.step} steps: stopped, without saving. What was saved before may "
                           f"be spoiled, too; start anew with a lower --lr than {self.args.lr}")
        if "mse" in means:
            means["PSNR"] = 10 * math.log10(255 ** 2 / means.pop("mse"))
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        seconds = (time.time() - self.mark) / len(self.seen)                        # per step
        left = timedelta(seconds=round((self.args.steps - self.step) * seconds))
        self.say(f"step {self.step:6d}/{self.args.steps}  {numbers}  {1 / seconds:.2f} steps/s  "
                 f"{self.pixels / 1e9:.4f} gigapixels  {left} left")
        self.seen, self.mark = [], time.time()

    def say(self, words):
        """Print a line. Where that is no longer possible (a closed pipe, a full disk), stop."""
        try:
            if self.rank == 0:
                print(words, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")
            self.status = self.status or 1

    def save(self):
        """Write what --resume needs, and then what ships."""
        if self.seen:
            self.tell()                                     # which finds what is not a number
        if self.rank > 0:
            return
        minutes = self.minutes + (time.time() - self.begin) / 60
        settings = {name: value for name, value in vars(self.args).items()
                    if name not in ("stage", "out", "resume", "commands")}
        recipe = {"commands": self.args.commands, "settings": settings, "steps": self.step,
                  "data": self.photos.description, "gigapixels": self.pixels / 1e9,
                  "minutes": minutes, "hardware": hardware(self.device),
                  "torch": str(torch.__version__)}
        arrays = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        arrays |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                arrays |= {f"optimizer.{key}.{names[p]}": t for key, t in state.items()}
        hfd.write_archive(self.state, {"recipe": recipe}, arrays)
        hfd.save_part(self.part, self.average, recipe, **self.more)

    def load(self):
        """Take over what an earlier run saved. HFDError if that is damaged."""
        path, prefixes = self.state, ("model.", "average.")
        if not path.exists():
            path, prefixes = self.part, ("weights.", "weights.")
            self.say(f"note: {self.state} is gone; going on from the averaged weights that ship")
        about, arrays = hfd.read_archive(path)
        try:
            tensors = {name: torch.from_numpy(a).float().to(self.device)
                       for name, a in arrays.items() if a.dtype.kind == "f"}
            for prefix, module in zip(prefixes, (self.model, self.average)):
                module.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()
                                        if name.startswith(prefix)})
            named = dict(self.model.named_parameters())
            owner = {p: optimizer for optimizer in self.optimizers
                     for group in optimizer.param_groups for p in group["params"]}
            for name, t in tensors.items():
                if name.startswith("optimizer."):
                    _, key, name = name.split(".", 2)
                    p = named[name]         # and in p's own order in memory, channels last
                    owner[p].state[p][key] = torch.empty_like(p).copy_(t) if t.ndim else t
            if any(len({frozenset(optimizer.state[p]) for p in owner if owner[p] is optimizer}) > 1
                   for optimizer in self.optimizers):
                raise ValueError("a part of the optimizer's state is missing")
            recipe = about["recipe"]
            self.step, self.minutes = int(recipe["steps"]), float(recipe["minutes"])
            self.pixels = round(1e9 * recipe["gigapixels"])
            if self.step < 0:
                raise ValueError("a negative number of steps")
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            text = " ".join(str(error).split())[:120]
            raise HFDError(f"{path}: cannot be resumed ({text})") from None

    def end(self):
        """Save, say how it ended, and exit with a status that says so, too."""
        self.save()
        words = f"at step {self.step}; saved {self.part}. {peak_memory(self.device)}"
        if self.step >= self.args.steps:
            return self.say("finished " + words)
        if self.rank == 0:
            with contextlib.suppress(OSError):
                print(f"stopped {words}; --resume goes on", file=sys.stderr, flush=True)
        sys.exit(self.status)


def hardware(device):
    """What this runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.processor())
    bf16 = ", bfloat16" if hfd.fast_bf16(device) else ""
    return f"{device.type.upper()}, {name}, {torch.get_num_threads()} threads{bf16}"


def peak_memory(device):
    """The most memory that this process has held so far, in words."""
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20                         # bytes or KiB
    words = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"
    if device.type == "cuda":
        words += f", on the GPU {torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB"
    return words


def compiled(networks, device):
    """On a GPU, let torch.compile fuse what lies between the convolutions; shapes are static, two
    crop sizes. What cannot be compiled runs as it is, and torch says so."""
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True
        for network in networks:
            network.compile(dynamic=False)


def adam(groups):
    """AdamW for these parameter groups, each with its own "peak" learning rate."""
    fused = groups[0]["params"][0].device.type != "mps"
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)


# Stage 1: rate + lambda * MSE ---------------------------------------------------------------------


def train_autoencoder(args, device, known):
    """Transforms, steps and prior, all levels at once (Balle et al. 2017). known:
    None or the hfd.Model to start from; if that has another prior, only the prior is learned."""
    photos = Photos(args.images, 2 * args.crop, device, args.megapixels,
                    args.variety, args.seed)
    config = known.autoencoder.config if known else hfd.AutoencoderConfig()
    config = replace(config, prior=args.prior)
    model = hfd.Autoencoder(config).to(device, memory_format=torch.channels_last)
    levels = len(config.lambdas)
    if known:
        model.load_state_dict(known.autoencoder.state_dict(), strict=False)         # what fits
        if known.autoencoder.config.prior != args.prior:
            model.requires_grad_(False).prior.requires_grad_(True)
    else:
        with torch.no_grad():
            x, q = photos.crops(32, args.crop), torch.zeros(32, dtype=torch.long, device=device)
            model.prior.fit_scale(model.analysis(x, q))
    # The linear path starts at a good place, with entries of about 0.02: it is refined, ten times
    # more slowly than the rest. The prior's parameters are octaves, and weights that end up a
    # hundred times larger than they start: they may move ten times as fast.
    groups = {0.1: [], 1: [], 10: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[0.1 if "linear" in name else 10 if name.startswith("prior") else 1].append(p)
    groups = [{"params": ps, "peak": args.lr * scale} for scale, ps in groups.items() if ps]
    optimizers = [adam(groups)]
    compiled([model.analysis, model.synthesis], device)

    def batch_loss(step, size, batch):
        """The mean objective over random crops, each at a random level."""
        x = photos.crops(batch, size)                                           # (B, 3, size, size)
        q = torch.randint(levels, (batch,)).to(device)                              # (B,)
        return {name: value.mean() for name, value in model(x, q).items()}

    fit(Run(args, "autoencoder", device, model, optimizers, photos), batch_loss)


# Stage 2: the diffusion model, given reconstructions ----------------------------------------------

MARGIN = 16     # pixels of context in which a crop's x_hat is made: borders should not be the rule
POOL = 16       # steps that a pool of pairs serves, of a quarter as many as these steps use


def train_diffusion(args, device, known):
    """The denoiser, on pairs of crops and their reconstructions by the autoencoder in args.out.
    known: None or the hfd.Model whose denoiser to start from. HFDError if it has no such one."""
    if not Path(args.out, "autoencoder.npz").exists():
        raise HFDError(f"{args.out}: has no autoencoder.npz; train stage 1 there, or copy one")
    base = hfd.load_model(args.out, device)
    autoencoder, levels = base.autoencoder, len(base.autoencoder.lambdas)
    photos = Photos(args.images, 2 * (args.crop + MARGIN), device, args.megapixels,
                    args.variety, args.seed)
    if known and not known.diffusion:
        raise HFDError(f"{args.init}: has no denoiser to start from")
    config = known.diffusion.config if known else hfd.DiffusionConfig(levels=levels)
    asked = {name: getattr(args, name) for name in ("kind", "eta", "objective")}
    config = replace(config, **{name: value for name, value in asked.items() if value is not None})
    if known and (known.diffusion.config.kind, config.levels) != (config.kind, levels):
        raise HFDError(f"{args.init}: its denoiser is of another kind, or for other quality levels")
    model = hfd.DENOISERS[config.kind](config).to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def pairs(x, q):
        """Crops (x, x_hat), (B, 3, size, size), cut out of larger ones x, (B, 3, size + 2 MARGIN,
        size + 2 MARGIN), at levels q (B,): made from rounded latents, as the decoder does."""
        k = (autoencoder.analysis(x, q) / autoencoder.step(q)).round()              # (B, M, h, w)
        x_hat = autoencoder.synthesis(autoencoder.dequantize(k, q), q).clamp(-1, 1)
        return [t[..., MARGIN:-MARGIN, MARGIN:-MARGIN] for t in (x, x_hat)]

    if known:
        model.load_state_dict(known.diffusion.state_dict())
    else:       # how far x is from x_hat, on the same crops for every level
        crops = photos.crops(256, args.crop + 2 * MARGIN)                           # (256, 3, ., .)
        for level in range(levels):
            q = torch.full((16,), level, device=device)
            gaps = [hfd.to_planes(torch.sub(*pairs(part, q))) for part in crops.split(16)]
            squares = [gap.square().mean(dim=(0, 2, 3)) for gap in gaps]            # (12,) each
            model.residual_std[level] = torch.stack(squares).mean(dim=0).sqrt()
    inside = {name for name, p in model.named_parameters() if p.ndim == 4 and ".conv" in name}
    matrices = [p for name, p in model.named_parameters() if name in inside]
    rest = [p for name, p in model.named_parameters() if name not in inside]
    optimizers = [adam([{"params": rest, "peak": args.lr}]),
                  Muon([{"params": matrices, "peak": 10 * args.lr}])]
    compiled([model.net], device)
    pool = {}

    def batch_loss(step, size, batch):
        """The mean objective over random pairs of crops, each at a random level.

        Making an x_hat costs a third of learning from it. But a pair can serve several draws of
        time and noise: so a pool of pairs serves POOL steps, and each pair four of them on average.
        It depends on the number of the pool alone: a run may be resumed half-way through."""
        number = step // POOL, size
        if number not in pool:
            run.seed(-1 - number[0])
            q = torch.randint(levels, (POOL // 4 * batch,)).to(device)              # (N,)
            made = [pairs(photos.crops(batch, size + 2 * MARGIN), part) for part in q.split(batch)]
            pool.clear()
            pool[number] = *(torch.cat(each) for each in zip(*made)), q             # x, x_hat, q
            run.seed(step)
        chosen = torch.randperm(POOL // 4 * batch)[:batch].to(device)               # (B,)
        x, x_hat, q = (each[chosen] for each in pool[number])
        return {"loss": model(x, x_hat, q)}

    run = Run(args, "denoiser", device, model, optimizers, photos, autoencoder=base.identity.hex())
    fit(run, batch_loss)


# The command line ---------------------------------------------------------------------------------


def command_line():
    """The parser of both stages, with every default in its help."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)
    stages = {"autoencoder": "stage 1: rate + lambda * MSE", "diffusion": "stage 2: x given x_hat"}
    ae, diffusion = (commands.add_parser(stage, help=text, formatter_class=sample.Help)
                     for stage, text in stages.items())
    for p, batch, crop in ((ae, 8, 128), (diffusion, 16, 64)):
        p.add_argument("--images", metavar="DIR", help="folder of pictures, or one picture; those "
                       "below are read, hidden ones and linked ones not. Without: dead leaves")
        p.add_argument("--out", metavar="DIR", default="runs/model", help="folder of the model")
        p.add_argument("--resume", action="store_true",
                       help="go on in --out, with its settings unless given anew")
        p.add_argument("--init", metavar="DIR", help="start from the model in this folder")
        p.add_argument("--seed", type=sample.seed_number, default=0, help="of everything random")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
        for flag, default, text in (
                ("steps", 20_000, "optimizer steps; the learning rate falls to zero there"),
                ("batch", batch, "crops per step (and per GPU)"),
                ("crop", crop, "their side, a multiple of 16; twice that in the last quarter"),
                ("lr", 1e-3, "peak learning rate of AdamW; Muon's (in stage 2) is ten times that"),
                ("warmup", 200, "steps until the peak is reached"),
                ("megapixels", 4000.0, "most picture data in memory (3 bytes a pixel)"),
                ("variety", 0.5, "share of crops that are resized, softened in colour, relit"),
                ("log-every", 50, "steps per line"), ("save-every", 1000, "steps per save")):
            p.add_argument("--" + flag, type=type(default), default=default, help=text)
    ae.add_argument("--prior", choices=entropy.PRIORS, default="context", help="Part I or Part II of "
                    "entropy.py; another than --init has is learned alone, so that pictures stay")
    new = "; left out: what --init has, or "
    diffusion.add_argument("--kind", choices=hfd.DENOISERS, help="plain v-prediction, with the "
                           "closed-form start, or with HFD+ too" + new + "plus")
    diffusion.add_argument("--eta", type=float, help="shift of the noise schedule: 1 is cosine, "
                           "the paper has 0.5" + new + "0.1")
    diffusion.add_argument("--objective", choices=hfd.SCHEDULES,
                           help="v: diffusion, flow: rectified flow" + new + "v")
    return parser


def parsed(argv):
    """The flags in argv; with --resume, what the run in --out was started with is their default,
    and `commands` are all that had a part in it. HFDError for flags without sense."""
    parser = command_line()
    args, commands = parser.parse_args(argv), []
    part = Path(args.out, "autoencoder.npz" if args.stage == "autoencoder" else "denoiser.npz")
    if args.resume:
        state = part.with_suffix(".training.npz")
        about, _ = hfd.read_archive(state if state.exists() else part)
        try:
            commands = list(about["recipe"]["commands"])
            words = [f"--{name.replace('_', '-')}={value}" for name, value
                     in about["recipe"]["settings"].items() if value is not None]
        except (LookupError, TypeError, AttributeError) as error:
            raise HFDError(f"{part}: its settings cannot be read ({error})") from None
        args = parser.parse_args([args.stage, *words, *argv[1:]])
    elif part.exists():
        raise HFDError(f"{part}: exists already. --resume continues it; to start anew, name "
                       "another --out or remove it")
    counts = args.batch, args.steps, args.warmup, args.log_every, args.save_every, args.crop
    if not all(isinstance(n, int) and 0 < n < 10 ** 9 for n in counts) or args.crop % hfd.CELL:
        raise HFDError("--batch, --steps, --warmup, --log-every and --save-every must be at least "
                       "1, --crop a multiple of 16")
    if not 0 <= args.variety <= 1:
        raise HFDError("--variety must lie between 0 and 1")
    if not all(0 < n < math.inf for n in (args.lr, args.megapixels, getattr(args, "eta", 1) or 1)):
        raise HFDError("--lr, --megapixels and --eta must be numbers above 0")
    words = "python train.py " + shlex.join(argv)
    args.commands = commands + [words] * (words not in commands)
    return args


def main(argv=None):
    """Run one command. argv: a list of words, or None for the shell's."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    try:
        os.makedirs(args.out, exist_ok=True)
        folder = os.open(args.out, os.O_RDONLY)
        if os.environ.get("RANK", "0") == "0":              # two runs would ruin each other's files
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HFDError(f"{args.out}: another run writes to it; wait for that, or choose another "
                       "--out") from None
    name, handlers = args.device, [(number, signal.getsignal(number)) for number in SIGNALS]
    if "WORLD_SIZE" in os.environ:                          # torchrun: a process per GPU
        if name == "auto" and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    try:
        device = sample.pick_device(name)
        known = hfd.load_model(args.init, device) if args.init else None
        torch.manual_seed(args.seed)
        stage = train_autoencoder if args.stage == "autoencoder" else train_diffusion
        stage(args, device, known)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        os.close(folder)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sample.run(main)

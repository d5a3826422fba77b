"""Learning: both stages, from any folder of pictures, on a GPU or a laptop.

    python train.py autoencoder --images PHOTOS --out runs/autoencoder.pt
    python train.py export runs/autoencoder.pt runs/ae_half.pt
    python train.py diffusion --autoencoder runs/ae_half.pt --images PHOTOS --out runs/hfd.pt
    python train.py export runs/hfd.pt runs/hfd_half.pt

The first export comes before stage 2, for an autoencoder in half precision is another one, which does not read the first one's files.
Without --images both train on *dead leaves* that this file draws itself, so nothing needs to be downloaded. Any run can be
stopped (Ctrl-C, or worse) and continued with --resume, and ends where it would have ended uninterrupted (on a CPU, bit for bit).
With several GPUs: torchrun --nproc_per_node N train.py ...
"""
import argparse
import copy
import fcntl
import json
import math
import os
import re
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
from PIL import Image, ImageDraw

import entropy
import hfd
import sample
from hfd import HFDError

# Pictures to learn from -------------------------------------------------------------------------------


def dead_leaves(size, rng):
    """A dead leaves picture, uint8 (size, size, 3): discs that fall on one another until nothing shows through.

    The simplest model of why photographs look as they do (Lee, Mumford & Huang 2001): the world is made of
    objects that hide each other, and they come in all sizes, so the radius r has density r^-3. That gives images edges,
    flat parts, and statistics that do not change with scale. Drawn at twice the size, then halved, for smooth edges.
    rng: a NumPy Generator.
    """
    big = 2 * size
    canvas = Image.new("RGB", (big, big))
    draw = ImageDraw.Draw(canvas)
    smallest, largest = 6.0, big / 2
    # The mean area of a disc is 2 pi smallest^2 log(largest / smallest). Ten times the canvas, in all, leaves e^-10 bare.
    count = int(10 * (1.2 * big) ** 2 / (2 * math.pi * smallest ** 2 * math.log(largest / smallest)))
    for u, x, y, grey, *others in rng.random((count, 6)):   # a shade of grey: red follows it closely, green and blue stray
        # Inverse transform sampling: if u is uniform, this radius has density ~ r^-3 between the two limits.
        r = (smallest ** -2 + u * (largest ** -2 - smallest ** -2)) ** -0.5
        x, y = (x * 1.2 - 0.1) * big, (y * 1.2 - 0.1) * big
        colour = tuple(int(255 * min(max(grey + 0.3 * (c - 0.5), 0), 1)) for c in (grey, *others))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return np.asarray(canvas.resize((size, size), Image.BOX))


def picture_files(folder):
    """The paths of all pictures in a folder and those below it, sorted: what bears the ending of a format that Pillow knows."""
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".") and
                  p.suffix.lower() in Image.registered_extensions())


def read_pictures(names):
    """The picture files that can be read, one after the other, each as uint8 (H, W, 3), upright. The others are named and skipped."""
    for name in names:
        try:
            yield np.asarray(sample.open_picture(name)[0])
        except HFDError as error:
            print(hfd.printable(f"warning: {error}; skipped"), file=sys.stderr)


class Photos:
    """Every picture of a folder, decoded once and kept as uint8 on the device that trains.

    Decoding JPEGs on the fly is what usually starves a GPU; a few hundred photographs fit into memory as they are."""

    def __init__(self, folder, smallest, device, megapixels, seed):
        """Raises HFDError if there is nothing to read. Bad files are named and skipped. Pictures with a side below
        `smallest` are continued by mirroring. Reading stops, and says so, at `megapixels` in all."""
        self.images, rng, total = [], np.random.default_rng(seed), 0
        if folder is None:
            pictures = (dead_leaves(256, rng) for _ in range(64))
        else:
            names = picture_files(folder)
            rng.shuffle(names)
            pictures = read_pictures(names)
        for array in pictures:
            array = np.pad(array, [(0, max(0, smallest - side)) for side in array.shape[:2]] + [(0, 0)], mode="symmetric")
            self.images.append(torch.from_numpy(array).permute(2, 0, 1).contiguous().to(device))            # (3, H, W)
            total += array.shape[0] * array.shape[1] / 1e6
            if total > megapixels:
                print(f"warning: stopped reading after {total:.0f} megapixels; --megapixels raises the limit", file=sys.stderr)
                break
        if not self.images:
            raise HFDError(f"{folder}: no pictures found there. Give --images a folder of pictures, or leave it out to train on dead leaves")
        self.description = f"{len(self.images)} pictures, {total:.0f} megapixels" if folder is not None else "dead leaves"

    def crops(self, count, size):
        """Random crops (count, 3, size, size) in [-1, 1], each mirrored half of the time. Uses torch's global seed."""
        batch = []
        for n, i, j, mirror in torch.rand(count, 4).tolist():
            image = self.images[int(n * len(self.images))]                                      # (3, H, W)
            i, j = int(i * (image.shape[1] - size + 1)), int(j * (image.shape[2] - size + 1))
            crop = image[:, i:i + size, j:j + size]                                             # (3, size, size)
            batch.append(crop.flip(2) if mirror < 0.5 else crop)
        return torch.stack(batch).float() / 127.5 - 1


# The loop that both stages share ----------------------------------------------------------------------

EMA = 0.999         # decay of the averaged weights


def fit(args, model, batch_loss, groups, checkpoint, photos, resumed):
    """Minimise batch_loss(model, crop_size, batch_size) -> {"loss": ..., other named numbers}, to args.steps.

    groups: optimizer parameter groups, each with its learning-rate factor "scale".
    checkpoint(ema, recipe): the dictionary to save, of the averaged model and how it was made. photos: what the recipe describes.
    resumed: the Model to go on from, or None.

    Every random number of step n comes from the seed (args.seed, n, rank). So a checkpoint need not store any random
    state, and a resumed run sees the very crops and noise that it would have seen.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = hfd.pick_device(args.device)
    bf16 = hfd.fast_bf16(device)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps")
    ema = copy.deepcopy(model)          # an exponential moving average of the weights is a better model than any single step's
    step, minutes = 0, 0.0
    if resumed:
        with hfd.refusing_damage(args.out):
            state = resumed.training
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            step, minutes, moments = int(state["step"]), float(state["minutes"]), state["optimizer"]["state"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if step < 0 or not all(own["step"].numel() == 1 and own["exp_avg"].shape == own["exp_avg_sq"].shape == parameters[i].shape
                                   for i, own in moments.items()):
                raise ValueError("its optimizer's state cannot be meant")
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    stop = []                                               # Ctrl-C asks the loop to end after the step that it is in
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    begin = mark = time.time()
    seen = []                                               # what the steps since the last line of progress said

    def interrupted():
        """Whether Ctrl-C was pressed, on any of the processes."""
        asked = torch.tensor(len(stop), device=device)
        if world > 1:
            dist.all_reduce(asked)                          # all processes must leave the loop at the same step
        return bool(asked)

    def save():
        """Write the checkpoint: what a user needs, and under training what --resume needs."""
        if rank == 0:
            training = {"step": step, "minutes": minutes + (time.time() - begin) / 60, "args": vars(args), "stage": args.stage,
                        "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            recipe = {"command": ", then ".join(args.commands), "data": photos.description, "seed": args.seed,
                      "steps": step, "hardware": hfd.hardware(device), "minutes": round(training["minutes"], 1),
                      "torch": str(torch.__version__)}
            hfd.write_atomically(args.out, lambda f: torch.save(checkpoint(ema, recipe) | {"training": training}, f))

    try:
        while step < min(args.steps, args.pause_at or args.steps) and not interrupted():
            torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
            # The last quarter sees crops of twice the side (and a quarter as many): what the net learns near a
            # crop's border, where it lacks context, then weighs less.
            late = step >= 0.75 * args.steps
            size, batch = (2 * args.crop, max(1, args.batch // 4)) if late else (args.crop, args.batch)
            warm_up = min(1.0, (step + 1) / max(args.warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * group["scale"] * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                terms = batch_loss(wrapped, size, batch)
            terms["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for name, value in (("loss", terms["loss"]), ("gradient", norm)):       # either could spoil the weights
                if not math.isfinite(value.item()):
                    raise HFDError(f"the {name} is {value.item()} at step {step}: stopped. If {args.out} was saved before, it holds the "
                                   f"last good state; continue from it with --resume and a lower --lr")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            decay = min(EMA, step / (step + 10))            # at first, over the last tenth of the steps only
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            seen.append({name: value.item() for name, value in terms.items()} | {"images": batch * world})
            if step % args.log_every == 0 or step == args.steps:
                seconds = (time.time() - mark) / len(seen)                                      # per step
                shown = {name: sum(said[name] for said in seen) / len(seen) for name in seen[0]}
                images = shown.pop("images") / seconds
                if "mse" in shown:
                    shown["PSNR"] = 10 * math.log10(255 ** 2 / shown.pop("mse"))
                if rank == 0:
                    numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
                    left = timedelta(seconds=round((args.steps - step) * seconds))
                    print(f"step {step:6d}/{args.steps}  {numbers}  {images:.1f} images/s  {left} left", flush=True)
                seen, mark = [], time.time()
            if (step == 1 or step % args.save_every == 0) and step < args.steps:     # from the first step on there is something to --resume
                save()
        save()                              # still deaf to Ctrl-C: somebody who presses it twice must not lose this
    finally:
        signal.signal(signal.SIGINT, previous)
    if rank == 0:
        print(f"{'stopped' if step < args.steps else 'finished'} at step {step}; saved {hfd.printable(args.out)}" +
              ("; continue with --resume" if step < args.steps else "") + f". {hfd.peak_memory(device)}")


def lineage(base, part, recipe):
    """The record of a model that goes on from `base`, if any: what is told of that, and how this part was made."""
    told = dict(base.recipe) if base else {}
    told.pop("measured", None)                              # on another model
    return told | {part: recipe}


# Stage 1: rate + lambda * MSE -------------------------------------------------------------------------


def train_autoencoder(args, resumed=None):
    """Stage 1: transforms, steps and prior, all levels at once (paper, section on the autoencoder; Balle et al. 2018). With --prior-of, the
    prior alone."""
    device = hfd.pick_device(args.device)
    torch.manual_seed(args.seed)
    photos = Photos(args.images, 2 * args.crop, device, args.megapixels, args.seed)
    known = resumed or (hfd.load_model(args.prior_of) if args.prior_of else None)
    base = known if args.prior_of else None
    model = hfd.Autoencoder(known and known.autoencoder.config).to(device, memory_format=torch.channels_last)   # what it was, whatever the defaults are now
    levels = len(model.config.lambdas)
    if base:            # only the prior learns: pictures stay what they were, and only bits change
        model.load_state_dict(base.autoencoder.state_dict())
        model.requires_grad_(False).prior.requires_grad_(True)
    else:
        with torch.no_grad():
            x = photos.crops(32, args.crop)
            model.prior.fit_scale(model.analysis(x, torch.zeros(len(x), dtype=torch.long, device=device)))

    def batch_loss(model, size, batch):
        """The mean objective over random crops, each at a random level."""
        x = photos.crops(batch, size)                                                           # (B, 3, size, size)
        q = torch.randint(levels, (batch,)).to(device)                                          # a level per picture
        return {name: value.mean() for name, value in model(x, q, prior_only=base is not None).items()}

    def checkpoint(ema, recipe):
        """Averaged weights, with the prior frozen to integer tables. A denoiser for the same pictures stays in it."""
        tables = entropy.freeze(ema.prior, ema.log_step.exp())
        return hfd.pack(ema, tables, base and base.diffusion, lineage(base, "prior" if base else "autoencoder", recipe))

    def scale(name):
        """The linear path starts at a good place, with entries of about 0.02: it is refined, ten times more slowly than the rest. The
        prior's parameters are octaves, and weights that end up a hundred times larger than they start: they may move ten times as fast."""
        return 0.1 if "linear" in name else 10.0 if name.startswith("prior") else 1.0

    groups = [{"params": [p for name, p in model.named_parameters() if scale(name) == s], "scale": s} for s in (0.1, 1.0, 10.0)]
    fit(args, model, batch_loss, groups, checkpoint, photos, resumed)


# Stage 2: the diffusion model, given reconstructions --------------------------------------------------

MARGIN = 16     # pixels of context in which a crop's x_hat is made: borders should not be what the net knows best


def train_diffusion(args, resumed=None):
    """Stage 2: the denoiser, on pairs of crops and their reconstructions by a finished stage 1."""
    device = hfd.pick_device(args.device)
    torch.manual_seed(args.seed)
    base = hfd.load_model(args.autoencoder, device)
    autoencoder = base.autoencoder
    levels = len(autoencoder.config.lambdas)
    config = hfd.DiffusionConfig(levels=levels, eta=args.eta, preconditioned=not args.plain, objective=args.objective)
    known = resumed or (base if args.finetune else None)
    if known and not known.diffusion:
        raise HFDError(f"{args.autoencoder}: has no denoiser to --finetune")
    if known:       # what it was, whatever the defaults are now; only the schedule may change
        old = known.diffusion.config
        if (old.levels, old.preconditioned) != (config.levels, config.preconditioned):
            raise HFDError(f"{args.out if resumed else args.autoencoder}: was trained {'with' if old.preconditioned else 'without'} the "
                           f"closed-form start and for {old.levels} levels; {'--resume' if resumed else '--finetune'} cannot change that")
        config = replace(old, eta=args.eta, objective=args.objective)
        if resumed and hfd.fingerprint(resumed.autoencoder.state_dict()) != hfd.fingerprint(autoencoder.state_dict()):
            print(f"note: {hfd.printable(args.autoencoder)} is not the autoencoder of {hfd.printable(args.out)}; the residual's spread stays what it was there")
    photos = Photos(args.images, 2 * (args.crop + MARGIN), device, args.megapixels, args.seed)
    model = hfd.Diffusion(config).to(device, memory_format=torch.channels_last)
    if known:
        model.load_state_dict(known.diffusion.state_dict())

    @torch.no_grad()
    def pairs(x, q):
        """Crops (x, x_hat), each (B, 3, size, size), cut out of larger ones x, (B, 3, size + 2 MARGIN, size + 2 MARGIN), at levels q, (B,)."""
        # Made from rounded latents, as the decoder makes it. (Where bfloat16 is used, that adds an error of about 0.01.)
        k = (autoencoder.analysis(x, q) / autoencoder.step(q)).round()                          # (B, M, h, w)
        x_hat = autoencoder.synthesis(autoencoder.dequantize(k, q), q).clamp(-1, 1)             # (B, 3, ., .)
        return (t[..., MARGIN:-MARGIN, MARGIN:-MARGIN] for t in (x, x_hat))

    if not known:       # how far x is from x_hat, level by level, on the same crops: the closed form starts from that
        crops = photos.crops(256, args.crop + 2 * MARGIN)                                       # (256, 3, ., .)
        for level in range(levels):
            q = torch.full((16,), level, device=device)
            squares = [hfd.to_planes(torch.sub(*pairs(part, q))).square().mean(dim=(0, 2, 3)) for part in crops.split(16)]      # (12,) each
            model.residual_std[level] = torch.stack(squares).mean(dim=0).sqrt()

    def batch_loss(model, size, batch):
        """The mean objective over random pairs of crops, each at a random level."""
        q = torch.randint(levels, (batch,)).to(device)
        x, x_hat = pairs(photos.crops(batch, size + 2 * MARGIN), q)                             # (B, 3, size, size)
        return {"loss": model(x, x_hat, q)}

    def checkpoint(ema, recipe):
        """Averaged weights, beside the autoencoder and tables that they belong to."""
        return hfd.pack(autoencoder, base.tables, ema, lineage(base, "finetuning" if args.finetune else "diffusion", recipe))

    fit(args, model, batch_loss, [{"params": list(model.parameters()), "scale": 1.0}], checkpoint, photos, resumed)


# The command line -------------------------------------------------------------------------------------


def measured(results, packed):
    """What figures.rate_distortion measured of a model, in lines for its checkpoint. ValueError if it was another model."""
    weights = [{name: t.float() for name, t in packed[part]["weights"].items()} for part in ("autoencoder", "diffusion")]
    if results["about"]["model"]["weights"] != hfd.fingerprint(*weights).hex()[:16]:
        raise ValueError

    lines = {"command": results["command"], "hardware": results["about"]["hardware"]}
    for key, point in results["points"].items():
        if key.startswith("level"):
            lines[key] = "; ".join(f"{name} {n['bpp']:.3f} bpp, {n['psnr']:.2f} dB" + (f", FD {n['fd']:.1f}" if "fd" in n else "")
                                   for name, n in point["variants"].items())
    return lines


def export(args):
    """Strip a training checkpoint to what a user needs: averaged weights in half precision, tables, recipe, and what was measured."""
    if os.path.isfile(args.out) and "training" in hfd.read_checkpoint(args.out):
        raise HFDError(f"{args.out}: could not be resumed any more if it were overwritten by an export; name another file")
    model = hfd.load_model(args.checkpoint)
    packed = hfd.pack(model.autoencoder, model.tables, model.diffusion, model.recipe, half=True)
    if args.results:
        try:
            packed["recipe"]["measured"] = measured(json.loads(Path(args.results).read_text()), packed)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HFDError(f"{args.results}: not what figures.rate_distortion writes about this model (measure the exported file)") from None
    hfd.write_atomically(args.out, lambda f: torch.save(packed, f))
    print(f"wrote {hfd.printable(args.out)}, {os.path.getsize(args.out) / 2 ** 20:.1f} MiB")


def command_line():
    """(parser, {stage: its own parser}), every flag with its default in the help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)
    show = dict(formatter_class=sample.Help)
    ae = commands.add_parser("autoencoder", help="stage 1: rate + lambda * MSE", **show)
    diffusion = commands.add_parser("diffusion", help="stage 2: sample x given x_hat", **show)
    for p, out, batch, crop in ((ae, "runs/autoencoder.pt", 8, 128), (diffusion, "runs/hfd.pt", 16, 64)):
        p.add_argument("--images", metavar="DIR", help="folder of pictures, read recursively; without it: dead leaves")
        p.add_argument("--out", metavar="FILE", default=out, help="checkpoint to write")
        p.add_argument("--resume", action="store_true", help="continue from --out, with its settings unless given anew")
        p.add_argument("--steps", type=int, default=20_000, help="optimizer steps in all; the learning rate falls to zero there")
        p.add_argument("--pause-at", type=int, metavar="STEP", help="save and stop at this step; --resume goes on")
        p.add_argument("--batch", type=int, default=batch, help="pictures per step (and per process, with torchrun)")
        p.add_argument("--crop", type=int, default=crop, help="side of the crops in pixels, a multiple of 16; twice that in the last quarter")
        p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
        p.add_argument("--warmup", type=int, default=200, help="steps until the learning rate is at its peak")
        p.add_argument("--seed", type=sample.seed_number, default=0, help="seed of everything random")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
        p.add_argument("--megapixels", type=float, default=2000.0, help="most picture data to keep in memory (3 bytes a pixel)")
        p.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="steps per progress line")
        p.add_argument("--save-every", type=int, default=1000, metavar="STEPS", help="steps per checkpoint")
    ae.add_argument("--prior-of", metavar="FILE", help="learn only a new prior, for the autoencoder in this checkpoint: the same pictures in "
                    "smaller files (files of the old one can then not be read)")
    diffusion.add_argument("--autoencoder", metavar="FILE", default="runs/autoencoder.pt", help="checkpoint of stage 1")
    diffusion.add_argument("--finetune", action="store_true", help="start from the denoiser that --autoencoder's checkpoint has, on "
                           "pictures of your own or with another --objective")
    diffusion.add_argument("--eta", type=float, default=0.1, help="shift of the noise schedule; 1 is cosine, the paper has 0.5")
    diffusion.add_argument("--objective", choices=sorted(hfd.SCHEDULES), default="v", help="v: diffusion; flow: rectified flow")
    diffusion.add_argument("--plain", action="store_true", help="plain v-prediction, without the closed-form start")
    ex = commands.add_parser("export", help="make a training checkpoint small enough to share", **show)
    ex.add_argument("checkpoint", help="what training wrote")
    ex.add_argument("out", help="file to write")
    ex.add_argument("--results", metavar="FILE", help="rate_distortion.json, whose numbers the checkpoint is to carry")
    return parser, {"autoencoder": ae, "diffusion": diffusion}


def checked(args):
    """The flags of a training stage, if they make sense; else HFDError."""
    if args.crop % hfd.CELL or args.crop > 4096 or min(args.crop, args.batch, args.steps, args.log_every, args.save_every) <= 0:
        raise HFDError("--crop must be a multiple of 16 up to 4096, --batch, --steps, --log-every and --save-every at least 1")
    if not (0 < getattr(args, "eta", 1) < math.inf and 0 < args.lr < math.inf and args.megapixels > 0):
        raise HFDError("--eta, --lr and --megapixels must be numbers above 0")
    if getattr(args, "objective", "v") not in hfd.SCHEDULES or args.steps > 10 ** 9 or not 0 <= args.seed < 2 ** 32:    # of a forged checkpoint, too
        raise HFDError("--objective, --steps or --seed cannot be meant")
    return args


def lock_of(path):
    """An open file that says that this process writes the checkpoint `path`, until it ends. HFDError if another one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(f"{path}.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HFDError(f"{path}: another run is writing it. Wait for that, or choose another --out") from None
    except OSError as error:                                # some network file systems know no locks
        raise HFDError(f"{path}.lock: cannot be locked ({error.strerror}); choose an --out on another disk") from None
    for left in path.parent.iterdir():                      # by a run that was killed while it saved
        if re.fullmatch(re.escape(path.name) + r"\.\d+\.tmp", left.name):
            left.unlink()
    return lock


def main(argv=None):
    """Run one command. argv: a list of words, or None for the shell's."""
    argv = sys.argv[1:] if argv is None else argv
    parser, stages = command_line()
    args = parser.parse_args(argv)
    if args.stage == "export":
        return export(args)
    if getattr(args, "finetune", False) and not args.resume:    # what the denoiser was trained with becomes the default
        if denoiser := hfd.load_model(args.autoencoder).diffusion:
            stages["diffusion"].set_defaults(eta=denoiser.config.eta, objective=denoiser.config.objective, plain=not denoiser.config.preconditioned)
            args = parser.parse_args(argv)
    checked(args)
    if args.resume and not os.path.exists(args.out):
        raise HFDError(f"{args.out}: no such checkpoint, so there is nothing to --resume")
    world = int(os.environ.get("WORLD_SIZE", 1))
    # Two runs writing one checkpoint would ruin both. (Of those that torchrun starts, only one writes.) Held until this function ends.
    lock = lock_of(Path(args.out)) if world == 1 or os.environ.get("RANK", "0") == "0" else None
    if os.path.exists(args.out) and not args.resume:    # looked at under the lock, for a run that just ended may have saved it
        raise HFDError(f"{args.out}: exists already. --resume continues it; to start anew, name another --out or remove it")
    resumed, commands = None, []                            # commands: all that made it, for the recipe
    if args.resume:     # what the checkpoint was trained with becomes the default; flags on the command line still win
        resumed = hfd.load_model(args.out)
        with hfd.refusing_damage(args.out):
            training = resumed.training or {}
            if training.get("stage") != args.stage or args.stage == "diffusion" and not resumed.diffusion:
                raise HFDError(f"{args.out}: not a training checkpoint of stage '{args.stage}', so --resume cannot continue it")
            fresh, commands = vars(parser.parse_args([args.stage])), list(training["args"]["commands"])
            settings = {name: training["args"].get(name, fresh[name]) for name in fresh if name not in ("stage", "resume", "pause_at", "out")}
            usual = lambda value, default: type(value) is type(default) or default is None and isinstance(value, str)   # a folder, say
            if not all(usual(value, fresh[name]) for name, value in settings.items()) or not all(isinstance(line, str) for line in commands):
                raise ValueError("its settings cannot be read")
            stages[args.stage].set_defaults(**settings)
            args = checked(parser.parse_args(argv))
            for flag in ("prior_of", "finetune"):
                if (was := settings.get(flag)) != getattr(args, flag, None):
                    raise HFDError(f"{args.out}: was trained {'with' if was else 'without'} --{flag.replace('_', '-')}; --resume cannot change that")
    if (line := "python train.py " + shlex.join(argv)) not in commands:
        commands.append(line)
    args.commands = commands
    if world > 1:
        cuda = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
        if cuda:            # each its own, before anything else is put on the first one
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise HFDError(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs here; start as many processes, or take --device cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    {"autoencoder": train_autoencoder, "diffusion": train_diffusion}[args.stage](args, resumed)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    hfd.run(main)

"""What the rivals share: one run's photos, as they see them, and a training that can be stopped.

A rival is trained on the very photos of a finished run of LADMIM, one category or several at once,
and keeps what it found in RUN/rivals: METHOD.json once it is done, METHOD.pt in training."""
import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import backbone
import data
import eval as evaluation
import ladmim
import runs


class Photos:
    """A run's photos. They are numbered; train and scored hold the numbers of the training photos
    and of those that get a score, the validation photos first."""

    def __init__(self, scored: evaluation.ScoredRun, cache: Path, precision: str = "fp32"):
        self.scored_run, self.cache, self.precision = scored, cache, precision
        self.names, self.seed = sorted(set(scored.category.tolist())), scored.config["seed"]
        root = evaluation.photos_root(scored, self.names)
        self.ladmim = ladmim.load_detector(scored.folder, self.names[0], runs.pick_device(None))
        self.size, self.device = self.ladmim.cfg.image_size, self.ladmim.mean.device
        found = [photo for name in self.names for photo in data.find_photos(root, name, self.seed)]
        self.features, self.photos, fingerprint = self.look(found, self.ladmim.cfg.grid)
        self.paths = [photo.path.relative_to(root).as_posix() for photo in self.photos]
        train, self.validation, test = (
            torch.tensor([i for i, photo in enumerate(self.photos) if photo.split == split],
                         dtype=torch.long) for split in data.SPLITS)
        self.train, self.scored = train, torch.cat([self.validation, test])
        tested = data.digests([self.photos[i] for i in self.scored], root)
        self.about = {"photos": fingerprint, "tested": tested}
        state = runs.load_finished(scored.folder, "run")
        if self.about != {"photos": state["fingerprint"], "tested": state["tested"]}:
            raise data.InputError(f"{scored.folder}: the photos in {root} changed since it was "
                                  "trained; run its train command again")
        self.about |= {"size": self.size, "grid": self.ladmim.cfg.grid, "version": VERSION}

    def look(self, photos: list, grid: int):
        """-> their features at grid x grid tokens, standardised over the training photos; the
        photos that can be read; the fingerprint of those to train on."""
        seen, left, rows, fingerprint = backbone.find_features(
            photos, self.ladmim.pdn, self.size, grid, False, self.device, self.cache,
            self.ladmim.white, self.ladmim.cfg.precision)
        train = torch.tensor([photo.split == "train" for photo in left])
        moments = backbone.channel_statistics(seen, rows[train])
        return backbone.Features(seen, *moments, self.device, rows), left, fingerprint

    @cached_property
    def everywhere(self) -> backbone.Features:
        """The PDN's features at all its positions, not averaged to tokens."""
        return self.look(self.photos, backbone.positions(self.size))[0]

    @cached_property
    def pixels(self) -> np.ndarray:
        """(n, S, S, 3) uint8."""
        paths = [photo.path for photo in self.photos]
        return np.stack(list(data.load_images(paths, self.size, self.ladmim.white)))

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) of the photos numbered by index, ImageNet's mean and std taken out."""
        return as_input(self.pixels[index.numpy()], self.device)

    def aurocs(self, scores) -> dict[str, dict]:
        """scores, one for each of `scored` -> each category's AUROCs."""
        first = len(self.validation)
        test, scores = [self.photos[i] for i in self.scored[first:]], np.array(scores[first:])
        kinds, names = (np.array([getattr(photo, key) for photo in test])
                        for key in ("kind", "category"))
        return {name: evaluation.aurocs(kinds[names == name], scores[names == name])
                for name in self.names}


def as_input(images: np.ndarray, device) -> torch.Tensor:
    """images (B, S, S, 3) uint8 -> (B, 3, S, S) as the PDN wants them."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    return backbone.imagenet(x).contiguous(memory_format=torch.channels_last)


def megabytes(*parts) -> float:
    """Of models and tensors, four bytes a number."""
    tensors = [[part] if torch.is_tensor(part) else part.parameters() for part in parts]
    return 4e-6 * sum(tensor.numel() for of_part in tensors for tensor in of_part)


def ladmim_megabytes(detector: ladmim.Detector) -> float:
    """Of LADMIM for one category: models, and the matrices of `whitened`."""
    return megabytes(detector.pdn, detector.hvq, detector.mim,
                     *detector.normal.get("histograms", {}).values())


def milliseconds(judge, photos: Photos) -> float:
    """An image's share of judge(images (8, S, S, 3) uint8), backbone included. A first, untimed
    call takes the costs that come once."""
    images = photos.pixels[photos.scored[:32].numpy()]
    with torch.inference_mode():
        judge(images[:8])
        began = now(photos.device)
        for start in range(0, len(images), 8):
            judge(images[start:start + 8])
    return 1e3 * (now(photos.device) - began) / len(images)


def now(device: torch.device) -> float:
    """A clock in seconds. Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


# Training

@dataclass
class Plan:
    """How a rival is trained: until its validation loss has settled, or for `steps` steps."""
    steps: int
    every: int                          # steps between two looks at the validation photos
    batch: int
    lr: float
    weight_decay: float


VERSION = 2                             # of the rivals: what another one kept is refused
PATIENCE, GAIN = 4, 0.01                # settled: PATIENCE looks in turn gained less than GAIN


def settled(losses: list[float]) -> bool:
    before, late = losses[:-PATIENCE], losses[-PATIENCE:]
    return bool(before) and min(late) > (1 - GAIN) * min(before)


def last_step(plan: Plan, since: int | None) -> int:
    """since: the step at which the loss had settled. The last twentieth has a tenth of the rate."""
    return min(plan.steps, math.ceil(since / 0.95)) if since else plan.steps


def fit(photos: Photos, name: str, model: nn.Module, plan: Plan, loss, look,
        steps: int | None = None) -> dict:
    """Trains the model by the plan, at most so many steps, or goes on where it was stopped; saves
    it at looks, at most once a minute. A step's randomness depends on its number alone, so the end
    is the same. Steps and looks are computed in the photos' precision.

    loss(batch, rng): of the photos numbered by batch; look(): the validation loss, and what else to
    keep of this step. -> "steps", "settled", "train": their seconds, "curve": what look() found."""
    plan = replace(plan, steps=steps or plan.steps)
    optimizer = torch.optim.AdamW(model.parameters(), plan.lr, weight_decay=plan.weight_decay)
    file = photos.scored_run.folder / "rivals" / f"{name}.pt"
    state = {"plan": vars(plan) | {"precision": photos.precision}, "about": photos.about,
             "step": 0, "settled": None, "seconds": 0.0, "curve": []}
    if file.exists():
        held = runs.load_file(file, str(file))
        if not isinstance(held, dict) or any(held.get(k) != state[k] for k in ("plan", "about")):
            raise data.InputError(f"{file}: was begun with other photos, --steps or --precision; "
                                  "type those again, or delete it")
        state = held
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    end, saved = last_step(plan, state["settled"]), time.monotonic()
    progress = runs.Progress(name, end, "steps", state["step"])
    while state["step"] < end:
        began, step = time.monotonic(), state["step"]
        late = step >= (state["settled"] or 0.95 * plan.steps)
        optimizer.param_groups[0]["lr"] = plan.lr * (0.1 if late else 1.0)
        rng = runs.seeded(photos.seed, name, step)
        torch.manual_seed(rng.initial_seed())
        model.train()
        batch = torch.randint(len(photos.train), (plan.batch,), generator=rng)
        with runs.in_precision(photos.precision, photos.device):
            found = loss(photos.train[batch], rng)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        state["seconds"] += now(photos.device) - began
        state["step"] = step = step + 1
        if step % plan.every == 0 or step == end:
            model.eval()
            with torch.inference_mode(), runs.in_precision(photos.precision, photos.device):
                validation, more = look()
            if not math.isfinite(validation):
                raise data.InputError(f"{name}: at step {step} the validation loss is {validation};"
                                      f" delete {file}, if there, and try another --precision")
            state["curve"].append({"step": step, "loss": validation, **more})
            losses = [one["loss"] for one in state["curve"]]
            if not state["settled"] and step < plan.steps and settled(losses):
                state["settled"] = step
                end = progress.total = last_step(plan, step)
            if time.monotonic() - saved > runs.SAVE_EVERY:   # what just gave a finite loss
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                runs.save_tensors(file, state)
                saved = time.monotonic()
        note = f"validation loss {state['curve'][-1]['loss']:.4g}" if state["curve"] else ""
        progress(step, note)
    model.eval()
    return {"steps": state["step"], "settled": bool(state["settled"]), "train": state["seconds"],
            "curve": state["curve"]}

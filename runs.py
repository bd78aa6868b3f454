"""Run folders: their settings, what a training keeps on disk, how it goes on; several processes."""
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

from data import (RENDERED_MARK, InputError, Parser, check_test_split, find_photos, tell,
                  write_whole)
from kernels.dispatch import use_triton
from options import seed_list

FORMAT = 4                               # of checkpoint.pt
SAVE_EVERY = 60.0                        # seconds between two checkpoints of a training
MAY_DIFFER = ("root", "commit", "device", "torch")   # between two sittings of a run
# The first set changes only the scores; the second, and mim_, the ViT. For --take all others agree.
SCORE_SETTINGS = {"hvq_score", "mim_score", "masks", "score_ratio", "score_block"}
VIT_SETTINGS = {"mask", "train_ratio", "train_block", "target"}


# Settings and options

@dataclasses.dataclass
class Job:
    """One requested run. cfg: the settings, ladmim.Config."""
    cfg: object
    preset: str
    root: Path                         # the folder that holds the category folders
    names: list[str]                   # categories; several are one model
    device: torch.device
    seed: int = 0
    category: str = ""                 # how the run is called: "all", or by default the names
    out: Path | None = None            # default: runs/DATA/CATEGORY-PRESET-seedN
    cache: Path = Path("cache")        # of features
    take: Path | None = None           # a run whose models are taken over
    runs: Path = Path("runs")          # the folder of runs

    def __post_init__(self):
        self.category = self.category or ",".join(self.names)
        name = f"{self.category}-{self.preset}-seed{self.seed}"
        self.out = self.out or Path(self.runs, os.path.basename(os.path.realpath(self.root)), name)

    def config(self) -> dict:
        """What config.json holds."""
        rendered = any((self.root / name / RENDERED_MARK).exists() for name in self.names)
        return {"data": os.path.basename(os.path.realpath(self.root)), "rendered": rendered,
                "root": os.path.realpath(self.root), "category": self.category, "seed": self.seed,
                "preset": self.preset, "commit": git_commit(), "device": self.device.type,
                "torch": str(torch.__version__), **dataclasses.asdict(self.cfg)}

    def defaults(self) -> dict:
        """Every setting's default: the config of an older run lacks settings that came later."""
        return dataclasses.asdict(type(self.cfg)())


def asked_jobs(args, cfg, preset: str, root: Path, names: list[str], device) -> list[Job]:
    """A run for each seed, with --separate for each category, too. Raises InputError for what is
    wrong with the later ones, too."""
    called = "all" if args.category == "all" and not args.separate else ""
    groups = [[name] for name in names] if args.separate else [names]
    if args.separate and args.category != "all" and len(names) == 1:
        raise InputError("--separate: does nothing beside one --category; leave it out")
    if args.take and len(groups) * len(args.seeds) > 1:
        raise InputError("--take: serves one run; leave --separate and further seeds out")
    jobs = [Job(cfg, preset, root, group, device, seed, called, cache=args.cache, take=args.take)
            for group in groups for seed in args.seeds]
    for job in jobs if args.out else ():
        job.out = args.out if len(jobs) == 1 else args.out / job.out.name
    for job in jobs:
        for test in (os.path.realpath(root / name / "test") for name in job.names):
            if Path(test) in Path(os.path.realpath(job.out)).parents:
                raise InputError(f"--out {job.out}: lies among the photos in {test}; name another")
    for job in jobs[1:]:                             # a mistake there is said before hours of work
        begun_state(job)
    for name in names if len(jobs) > 1 else ():
        check_test_split(find_photos(root, name, jobs[0].seed))
    return jobs


def parse(argv, config_class, presets: dict, options: dict, add_predict_options):
    """The command line of ladmim.py. Each field of config_class is an option of `train`; options
    holds the values that some of them are one of. add_predict_options(parser) adds `predict`'s."""
    parser = Parser(prog="ladmim.py", description="Logical anomaly detection: train and predict.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on good photos, score the others",
                                description="Trains on photos of good products and scores the "
                                "others. Every photo is squashed to a square of --image-size.")
    add = train.add_argument
    add("--category", required=True, help="a folder's name, a comma list or all: one model for all")
    add("--separate", action="store_true", help="a run for each of these instead")
    add("--data", help="folder of the category folders (default: data/mvtec_loco_anomaly_detection "
        "or, where there is none, the rendered twin)")
    add("--preset", choices=presets, help="default: fast with a GPU, tiny without")
    add("--seed", "--seeds", dest="seeds", type=seed_list, default=[0], metavar="SEED",
        help="a number, or several as in 0-4 or 0,3,7: a run for each; what is trained is not "
        "trained again. A scheduler can start each by itself")
    add("--out", type=Path, help="run folder, or the folder that holds those of several runs "
        "(default: runs/DATA/CATEGORY-PRESET-seedN)")
    add("--take", type=Path, metavar="RUN", help="a finished run whose models are taken over, as "
        "far as the settings agree")
    add("--cache", type=Path, default=Path("cache"), help="of features (default: cache)")
    settings = train.add_argument_group("settings (default: the preset's)")
    for field in dataclasses.fields(config_class):
        settings.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default),
                              choices=options.get(field.name))

    predict = commands.add_parser("predict", help="score photos with a trained run")
    add_predict_options(predict)
    for command in (train, predict):
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU, if any")
    return parser.parse_args(argv)


# Machine

def pick_device(name: str | None) -> torch.device:
    """name: "cpu", "cuda" or None, which takes a GPU where there is one."""
    found = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not found:
        raise InputError("--device cuda: this machine has no CUDA GPU that torch can use; leave "
                         "the option out for the CPU")
    device = torch.device("cuda" if found else "cpu")
    torch.backends.cudnn.conv.fp32_precision = "ieee"        # TF32's features would be others
    try:
        use_triton(device)
    except RuntimeError as error:                    # of LADMIM_KERNELS
        raise InputError(str(error)) from None
    return device


def git_commit() -> str:
    """The commit of this code, "-dirty" behind it where the files differ, "" outside git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):     # OSError: no git on this machine
        return ""


def seeded(*key) -> torch.Generator:
    """A generator that depends on its key alone. No randomness is carried from one epoch to the
    next, so a resumed run needs only the epoch's number to go on exactly."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def in_precision(precision: str, device: torch.device):
    """Inside, products are computed in bfloat16 where precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# Several processes: torchrun --nproc-per-node N ladmim.py train ...
#
# Every process holds the whole model and all features, draws the same randomness, and takes its
# share of each batch. Gradients and code counts are added up, so that all take the same step.
# Process 0 alone writes and prints. DistributedDataParallel would average gradients, which is
# wrong where shares are uneven, and knows nothing of code counts.

def processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch: even parts but for one element, empty where there are fewer
    elements than processes."""
    rank, size = processes()
    return batch.tensor_split(size)[rank]


@torch.no_grad()
def add_up(tensors: list[torch.Tensor]):
    """Replaces each float tensor by its sum over the processes, all of them in one message."""
    if processes()[1] == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def sum_gradients(weights: list[torch.nn.Parameter]):
    """Adds up the processes' gradients. One that had no photos of the batch adds zeros."""
    if processes()[1] == 1:
        return
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    add_up([weight.grad for weight in weights])


def as_first(value):
    """What process 0 has for `value`, in all of them."""
    held = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(held, 0)
    return held[0]


@contextlib.contextmanager
def first_process_first():
    """What is inside is done by process 0 before the others: they find its files."""
    rank, size = processes()
    if rank:
        dist.barrier()
    yield
    if size > 1 and not rank:
        dist.barrier()


@contextlib.contextmanager
def joined(device: torch.device):
    """Inside, the processes that torchrun started know each other; all but the first are mute."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT"} <= os.environ.keys():
        raise InputError("WORLD_SIZE is set, but not by torchrun: start several processes with it, "
                         "or unset WORLD_SIZE")
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise InputError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} "
                             "GPUs; start at most as many")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(days=1))       # the others wait for features
    out, err = sys.stdout, sys.stderr
    if dist.get_rank():
        out = err = open(os.devnull, "w")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
    dist.destroy_process_group()         # not after an error: NCCL's waits for the other processes


# Files of tensors

def load_file(path: Path, name: str):
    """torch.load of tensors and plain values only. name: how an error calls the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise
    except Exception:                    # torch.load raises another class for each kind of damage
        raise InputError(f"{name}: not PyTorch weights, or truncated; restore it") from None


def load_checkpoint(path: Path) -> dict:
    """What checkpoint.pt holds. A foreign, damaged or newer file is an InputError."""
    state = load_file(path, str(path))
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(f"{path}: not a checkpoint of ladmim.py")
    whole = False
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
        whole = file.testzip() is None   # torch writes checksums and reads none
    if not whole:
        raise InputError(f"{path}: damaged, its checksums do not match; train the run again or "
                         "restore the file")
    if state["format"] != FORMAT:
        raise InputError(f"{path}: format {state['format']}, this version reads {FORMAT}; use the "
                         "version that wrote it")
    return state


def load_finished(folder: Path, option: str = "--run") -> dict:
    """The checkpoint of a run whose training is finished."""
    if not (folder / "checkpoint.pt").exists():
        raise InputError(f"{option} {folder}: holds no checkpoint.pt; name a run of `train`")
    state = load_checkpoint(folder / "checkpoint.pt")
    if state["stage"] != "done":
        raise InputError(f"{option} {folder}: its training is not finished; run the same train "
                         "command again, it goes on")
    return state


def save_tensors(path: Path, state: dict):
    """Writes what load_file reads, whole or not at all."""
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, content.getbuffer())


# A run

class Progress:
    """One line that says how far the work is, how fast, and how long it will take: rewritten in
    place on a terminal, a new line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int, note: str = ""):
        now, tty = time.monotonic(), sys.stderr.isatty()
        if done < self.total and now - self.shown < (0.2 if tty else 10):
            return
        self.shown, rate = now, (done - self.done) / max(now - self.start, 1e-9)
        line = (f"{self.label}: {done}/{self.total} {self.unit}, {rate:.3g}/s, "
                f"{(self.total - done) / max(rate, 1e-9):.0f} s left{note and ', ' + note}")
        end = "" if tty and done < self.total else "\n"
        tell(f"\r{line[:118]:<118}" if tty else line, end)


def lock(folder: Path, remedy="wait until it ends or choose another --out"):
    """Makes the folder and locks it until the returned file is closed or this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training in it; {remedy}") from None
    except OSError:                      # a file system without locks, as some network drives are
        pass
    for left in folder.glob(f".{'[0-9a-f]' * 16}.new"):      # `write_whole`'s, by a kill
        left.unlink()
    return file


def begun_state(job: Job) -> dict | None:
    """What the checkpoint in the job's folder holds, None where there is none. Raises InputError
    where it is of a run with other settings."""
    file = job.out / "checkpoint.pt"
    if not file.exists():
        if job.out.exists() and not job.out.is_dir():
            raise InputError(f"--out {job.out}: is no folder; name another one")
        if job.take:
            load_finished(job.take, "--take")
        ours = processes()[0] > 0                    # only the first process checks
        with contextlib.suppress(OSError, ValueError, AttributeError):      # no checkpoint yet
            ours |= {"preset", "root", "seed"} <= json.loads(
                (job.out / "config.json").read_bytes()).keys()
        for name in ("config.json", "metrics.jsonl", "scores.csv", "maps.npz"):
            if not ours and (job.out / name).exists():
                raise InputError(f"--out {job.out}: holds a {name}, but no run; name another one")
        return None
    state = load_checkpoint(file)
    held = job.defaults() | state["config"]
    for name, value in job.config().items():
        if name not in MAY_DIFFER and held.get(name) != value:
            raise InputError(f"{job.out}: holds a run with {name} = {held.get(name)}, asked for "
                             f"{value}; choose another --out or delete the folder")
    take = job.take and os.path.relpath(job.take, job.out)
    if take and state.get("taken", take) != take:
        raise InputError(f"--take {job.take}: the run in {job.out} was not begun with it; leave "
                         "the option out or choose another --out")
    return state


class Run:
    """A run's folder, and `state`, what its checkpoint holds. The stages are "" (nothing is
    trained), "hvq" and "mim" (in training; `epoch` of it are done) and "done" (trained and scored).
    "hvq taken" and "taken whole": HVQ-Trans or both models came from another run."""

    FINISHED = {"hvq": ("hvq taken", "taken whole", "mim", "done"), "mim": ("taken whole", "done")}

    def __init__(self, job: Job):
        """Makes the folder, or goes on with the run that it holds."""
        self.folder, self.seed = job.out, job.seed
        self.saved, self.asked_to_stop = time.monotonic(), False
        self.writes = processes()[0] == 0
        self.lock = lock(self.folder) if self.writes else None
        self.state = begun_state(job) or {
            "format": FORMAT, "config": job.config(), "stage": "", "epoch": 0, "metrics": [],
            "taken": job.take and os.path.relpath(job.take, job.out)}    # both may be moved
        if self.writes and not self.state["stage"]:      # scores of a run that is gone
            (self.folder / "scores.csv").unlink(missing_ok=True)
        self.state["config"]["root"] = os.path.realpath(job.root)    # a data set may have moved
        if self.writes:
            write_whole(self.folder / "config.json",
                        (json.dumps(self.state["config"], indent=1) + "\n").encode())
        self.write_metrics()

    def save(self, **news):
        """Updates the state and writes it as checkpoint.pt."""
        self.state.update(news)
        if self.writes:
            save_tensors(self.folder / "checkpoint.pt", self.state)
        self.saved = time.monotonic()

    def write_metrics(self):
        if self.writes:
            lines = "".join(json.dumps(line) + "\n" for line in self.state["metrics"])
            write_whole(self.folder / "metrics.jsonl", lines.encode())

    def log(self, **line):
        self.state["metrics"].append(line)
        self.write_metrics()

    def hold(self, **fixed):
        """Puts the backbone, its features' moments and their fingerprint into the state. A run
        that has them keeps them, and goes on only with the same photos and weights."""
        if self.state.get("fingerprint", fixed["fingerprint"]) != fixed["fingerprint"]:
            raise InputError(f"{self.folder}: the training photos or the backbone changed since "
                             "this run began, or another version held out other photos for "
                             "validation; choose another --out or delete the folder")
        self.state = fixed | self.state

    def take_over(self, job: Job):
        """Starts this run with what a finished one, job.take, has learned, as far as their settings
        agree: HVQ-Trans, or both models."""
        state, mine, usual = load_finished(job.take, "--take"), self.state["config"], job.defaults()
        held = usual | state["config"]
        differ = {name for name in usual if held[name] != mine[name]}
        others = {name for name in differ if not name.startswith("mim_")}
        why = ", ".join(sorted(others - SCORE_SETTINGS - VIT_SETTINGS))
        if held["seed"] != self.seed:
            why = why or "its seed"
        if state["fingerprint"] != self.state["fingerprint"]:
            why = why or "its photos or backbone"
        if why:
            raise InputError(f"--take {job.take}: differs from this run in {why}; leave the option "
                             "out")
        stages = ("hvq",) if differ - SCORE_SETTINGS else ("hvq", "mim")
        self.state.update({part: state[part] for part in (*stages, "mean", "std")},
                          stage="taken whole" if len(stages) == 2 else "hvq taken",
                          metrics=[one for one in state["metrics"] if one["stage"] in stages])

    def has_trained(self, stage: str, model) -> bool:
        """Whether this stage was trained before; the model is then as it was at its end."""
        if self.state["stage"] not in self.FINISHED[stage]:
            return False
        model.load_state_dict(self.state[stage])
        model.eval().requires_grad_(False)
        return True

    def resume(self, stage: str, epochs: int, model, optimizer) -> int:
        """The epoch to begin with. Where a stopped run goes on, model and optimiser are as they
        were after the last one that was saved."""
        first = 0
        if self.state["stage"] == stage:
            model.load_state_dict(self.state[stage])
            optimizer.load_state_dict(self.state["optimizer"])
            first = self.state["epoch"]
        self.progress = Progress(f"{stage} training", epochs, "epochs", first)
        return first

    def begin_epoch(self, stage: str, epoch: int, model) -> torch.Generator:
        """-> this epoch's randomness. Dropout draws other numbers in each process."""
        generator = seeded(self.seed, stage, epoch)
        torch.manual_seed(generator.initial_seed() + processes()[0])
        if processes()[1] > 1:           # they differ by GPU rounding and, with dropout, revival
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
        model.train()
        self.began = time.monotonic()
        return generator

    def mean_loss(self, stage: str, epoch: int, total: torch.Tensor, n: int) -> float:
        """total: this process's sum of the losses of its photos, of n in all. Here an epoch waits
        for the GPU; no step does."""
        stop = torch.full_like(total, self.asked_to_stop)
        add_up([total, stop])            # one process that is asked to stop stops all
        self.stopping, mean = bool(stop), float(total) / n
        if not math.isfinite(mean):
            raise InputError(f"{stage} training: the loss is {mean} in epoch {epoch + 1}; the last "
                             f"good checkpoint is kept; try a smaller --{stage}-lr")
        return mean

    def end_epoch(self, stage: str, done: int, loss: float, model, optimizer, **more):
        """Logs the epoch, and saves once a minute, at the end, and where Ctrl-C asked for it.
        done: epochs of this stage that are done; more: what else to log."""
        seconds = round(time.monotonic() - self.began, 3)
        self.log(stage=stage, epoch=done, loss=round(loss, 6), seconds=seconds, **more)
        self.progress(done, f"loss {loss:.4f}")
        late = time.monotonic() - self.saved > SAVE_EVERY
        if late or done == self.progress.total or self.stopping:
            self.save_stage(stage, done, model, optimizer)
        if self.stopping and as_first(True):         # which has saved: all wait
            raise KeyboardInterrupt

    def save_stage(self, stage: str, epoch: int, model, optimizer):
        weights = model.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            raise InputError(f"{stage} training: weights overflow in epoch {epoch}; the last good "
                             f"checkpoint is kept; try a smaller --{stage}-lr")
        self.state[stage] = weights
        self.save(stage=stage, epoch=epoch, optimizer=optimizer.state_dict())

    def finish(self, stage: str, model, optimizer):
        """-> the trained model, frozen."""
        if self.state["stage"] != stage:             # no epoch was asked for, so none has saved
            self.save_stage(stage, 0, model, optimizer)
        return model.eval().requires_grad_(False)

    @contextlib.contextmanager
    def stoppable(self):
        """Inside, the first Ctrl-C only asks: the training stops after its epoch, where nothing is
        lost. The second one stops at once."""
        def interrupted(number, frame):
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True
            tell("\nstopping after this epoch; Ctrl-C again stops at once")

        self.asked_to_stop = False
        before = signal.signal(signal.SIGINT, interrupted)
        try:
            yield
            if self.asked_to_stop and processes()[1] == 1:   # while the last epoch was saved
                raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

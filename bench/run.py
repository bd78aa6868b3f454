"""The kernels against plain torch, on whatever machine this is: python bench/run.py

With a GPU the Triton kernels are measured, without one the torch paths. --naive instead times
training and scoring the long way (bench/naive.py) against ours. Prints Markdown tables and writes
them, and the numbers as JSON, to bench/results/."""
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Otherwise the profiler prints, whatever Python is told. Torch has to see it before it is imported.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch  # noqa: E402

import data  # noqa: E402
import ladmim  # noqa: E402
import naive  # noqa: E402
import runs  # noqa: E402
from backbone import CHANNELS  # noqa: E402
from kernels import histogram_l1, nearest_code  # noqa: E402
from kernels.dispatch import triton  # noqa: E402
from kernels.histogram_l1 import histogram_l1_reference  # noqa: E402
from scores import histograms  # noqa: E402
from twin.render import render  # noqa: E402

LEVELS, CODES, TOKENS = 4, 512, 576  # the paper's


# Measuring

def once(function, device: str, flush=None) -> float:
    """Seconds of one call, on a GPU with its L2 cache flushed before."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(function, device: str) -> int:
    """Bytes that one call has allocated at most, beyond what was there before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate((event.nbytes() for event in events
                                     if event.name() == "[memory]"), initial=0))


def measure(functions: dict, device: str, seconds: float) -> dict:
    """Each turn calls every function once, in random order: other load and warm caches then act on
    all of them alike. A function 10 times as slow as another has only 5 turns, so that the others
    may have many. -> name: median and spread in seconds, runs, memory."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    times, memory = {}, {}
    for name, function in functions.items():
        try:
            once(function, device, flush)
            memory[name] = peak_memory(function, device)
            times[name] = []
        except Exception as error:  # a compiler that is missing or does not fit
            data.tell(f"  {name}: not available ({type(error).__name__})")
    start, order, turn = time.perf_counter(), random.Random(0), list(times)
    while time.perf_counter() - start < seconds or len(times[turn[0]]) < 5:
        for name in order.sample(turn, len(turn)):
            times[name].append(once(functions[name], device, flush))
        if len(times[turn[0]]) == 5:
            enough = 10 * min(map(statistics.median, times.values()))
            turn = [name for name in turn if statistics.median(times[name]) < enough]
    return {name: {"median": statistics.median(t), "low": sorted(t)[len(t) // 10], "runs": len(t),
                   "high": sorted(t)[len(t) * 9 // 10], "MiB": memory[name] / 2**20}
            for name, t in times.items()}


def roofline(device: str, seconds: float) -> dict:
    """This machine's FLOP/s of a large product (float16 on a GPU) and bytes/s of a large copy."""
    n, dtype, size = 2048, torch.float32, 2**27
    if device == "cuda":
        n, dtype, size = 8192, torch.float16, 2**30
    a, big = torch.randn(n, n, device=device).to(dtype), torch.empty(size, device=device)
    other = torch.empty_like(big)
    best = measure({"product": lambda: a @ a, "copy": lambda: other.copy_(big)}, device, seconds)
    return {"flops": 2 * n**3 / best["product"]["low"], "bytes": 8 * size / best["copy"]["low"]}


def kernel_rows(row: dict, result: dict, flops: float, moved: int, ceiling: dict) -> list:
    """A row a variant: its speed over the fastest plain one's and the roofline's. moved: bytes."""
    data.tell(f"  {row['kernel']} {row['shape']}, {row['mode']}")
    floor = max(flops / ceiling["flops"], moved / ceiling["bytes"])
    plain = [r["median"] for name, r in result.items() if name != "kernels"]
    best = min(plain, default=float("nan"))
    return [{**row, "variant": name, **r, "ratio": best / r["median"],
             "roofline": floor / r["median"]} for name, r in result.items()]


# The two kernels

def plain_nearest(x, codebook):
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def nearest_rows(device: str, shape: tuple, seconds: float, ceiling: dict) -> list:
    T, K, D = shape
    x, codebook = torch.randn(T, D, device=device), torch.randn(K, D, device=device)
    functions = {"kernels": lambda: nearest_code(x, codebook)[0]}
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda" or 3 * T * K * 4 < free:  # a GPU says when it is full, Linux kills
        quick = torch.compile(plain_nearest, dynamic=False)
        functions |= {"cdist, argmin": lambda: torch.cdist(x, codebook).argmin(1),
                      "addmm, argmin": lambda: plain_nearest(x, codebook),
                      "compiled addmm, argmin": lambda: quick(x, codebook)}
    result, n = measure(functions, device, seconds), 40_000 if device == "cuda" else 2_000
    exact = torch.cdist(x[:n].double(), codebook.double()).argmin(1)
    for name in result:
        result[name]["wrong"] = int((functions[name]()[:n] != exact).sum())
    row = {"kernel": "nearest_code", "shape": f"T={T:,} K={K:,} D={D}", "mode": "forward"}
    return kernel_rows(row, result, 2 * T * K * D, 4 * (T * D + K * D) + 12 * T, ceiling)


def histogram_calls(variant, logits, codes, mask) -> dict:
    kept = variant(logits, codes, mask).sum()

    return {"forward": torch.no_grad()(lambda: variant(logits, codes, mask)),
            "backward": lambda: torch.autograd.grad(kept, logits, retain_graph=True),
            "both": lambda: torch.autograd.grad(variant(logits, codes, mask).sum(), logits)}


def histogram_rows(device: str, batch: tuple, seconds: float, ceiling: dict) -> list:
    (B, M), rows = batch, []
    logits = torch.randn(B, M, LEVELS, CODES, device=device, requires_grad=True)
    codes = torch.randint(0, CODES, (B, LEVELS, TOKENS), dtype=torch.int16, device=device)
    mask = torch.rand(M, TOKENS, device=device) < 0.4
    variants = {"kernels": histogram_l1, "scatter": histogram_l1_reference,
                "one-hot": lambda logits, codes, mask:
                    (logits.softmax(-1) - histograms(codes, mask, CODES)).abs().sum(-1)}
    calls = {name: histogram_calls(f, logits, codes, mask) for name, f in variants.items()}
    for mode, passes in (("forward", 1), ("backward", 2), ("both", 4)):
        result = measure({name: modes[mode] for name, modes in calls.items()}, device, seconds)
        moved = passes * logits.numel() * 4 + codes.numel() * 2 + mask.numel()
        row = {"kernel": "histogram_l1", "shape": f"B={B} M={M}", "mode": mode}
        rows += kernel_rows(row, result, 0, moved, ceiling)
    return rows


# Whole steps

def step_rows(steps: dict, detector, device: str, seconds: float) -> list:
    """steps: step -> {way: (images, function)}, one of the ways "ours". -> a row a way, with the
    time of an image, also as a multiple of ours."""
    rows = []
    for step, ways in steps.items():
        detector.hvq.train("HVQ" in step), detector.mim.train("ViT" in step)
        result = measure({way: function for way, (_, function) in ways.items()}, device, seconds)
        each = {way: r["median"] / ways[way][0] for way, r in result.items()}
        for way, r in result.items():
            rows.append({"step": step, "variant": way, "an image": each[way],
                         "images": ways[way][0], "ratio": each[way] / each["ours"], **r})
        data.tell(f"  {step}")
    return rows


def kernel_steps(detector, device: str) -> dict:
    """A training step of each stage and scoring, with plain torch and with our kernels."""
    cfg, hvq, mim = detector.cfg, detector.hvq, detector.mim
    h0 = torch.randn(max(cfg.hvq_batch, cfg.mim_batch, 8), cfg.grid**2, CHANNELS, device=device)
    masks = ladmim.draw_masks(cfg, cfg.mim_batch, runs.seeded(0), scoring=False).to(device)
    for_hvq, for_mim = naive.our_losses(detector, h0, masks)
    steps = {"train HVQ-Trans": (cfg.hvq_batch, naive.step(hvq, for_hvq)),
             "train ViT": (cfg.mim_batch, naive.step(mim, for_mim)),
             "score": (8, lambda: ladmim.errors(hvq, mim, cfg, h0[:8], detector.masks))}
    in_place = patch.multiple(                       # of the kernels
        ladmim, histogram_l1=histogram_l1_reference, nearest_own_code=lambda x, codebooks, own:
            plain_nearest(x.flatten(0, 1), codebooks[0]).view(x.shape[:2]))
    return {name: {"plain torch": (images, in_place(step)), "ours": (images, step)}
            for name, (images, step) in steps.items()}


# Tables

FORMATS = {"ratio": "{:.2f}".format, "roofline": "{:.0%}".format, "MiB": "{:.1f}".format,
           **dict.fromkeys(("median", "low", "high", "an image"),
                           lambda seconds: f"{seconds * 1e3:.3g} ms")}


def table(rows: list[dict], *columns) -> str:
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([FORMATS.get(name, str)(row[name]) if name in row else "" for name in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(results: dict) -> str:
    """Everything in Markdown."""
    spread = ("median", "low", "high", "runs", "MiB")
    parts = [f"Measured on {results['device']}, {results['versions']}, commit "
             f"{results['commit'] or 'unknown'}. Low and high: a tenth of the runs lies beyond."]
    if "kernels" in results:
        parts += ["Ratio: speed, as a multiple of the fastest plain version's.",
                  table(results["kernels"], "kernel", "shape", "mode", "variant", "ratio", *spread,
                        "roofline", "wrong")]
    parts += [f"Preset {results['preset']}, {results['masks']} masks. Ratio: time of an image, as "
              "a multiple of ours.",
              table(results["steps"], "step", "variant", "an image", "images", "ratio", *spread)]
    return "\n\n".join(parts) + "\n"


def parse(argv):
    parser = data.Parser(prog="bench/run.py", description="Measures the kernels on this machine.")
    parser.add_argument("--seconds", type=float, help="a comparison (default 2, with --quick 0.1)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it all run?")
    parser.add_argument("--naive", action="store_true", help="only this: the long way, and ours")
    parser.add_argument("--preset", choices=("paper", "fast", "tiny"), help="paper; tiny on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    args = parser.parse_args(argv)
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise data.InputError(f"--seconds {args.seconds}: must be a number above 0")
    return args


def measure_kernels(device: str, seconds: float, quick: bool) -> dict:
    # T tokens, here of 64 images, K codes, D dimensions; B images, M masks. The paper's come first.
    shapes = [(36_864, 512, 64), (36_864, 512, 16), (36_864, 512, 256), (36_864, 4096, 64),
              (1_000_000, 512, 64)]
    batches = [(32, 1), (8, 64)]
    if device == "cuda":
        shapes.append((1_000_000, 8192, 64))
        batches = [(32, 1), (16, 16), (16, 64), (256, 64)]
    if quick:
        shapes, batches = [(500, 64, 16)], [(2, 3)]
    ceiling, rows = roofline(device, seconds), []
    for shape in shapes:
        rows += nearest_rows(device, shape, seconds, ceiling)
    for batch in batches:
        rows += histogram_rows(device, batch, seconds, ceiling)
    return {"ceiling": ceiling, "kernels": rows}


def benchmark(args) -> int:
    warnings.filterwarnings("ignore")                # until `run_command` ends
    args.out.mkdir(parents=True, exist_ok=True)
    device = runs.pick_device(None).type
    preset = args.preset or ("paper" if device == "cuda" else "tiny")
    seconds = args.seconds or (0.1 if args.quick else 2.0)
    settings = {"masks": 2, "hvq_batch": 2, "mim_batch": 2} if args.quick else {"masks": 64}
    versions = (f"torch {torch.__version__}, triton {triton.__version__ if triton else 'none'}, "
                f"Python {platform.python_version()}")
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else name
    results = {"device": name, "versions": versions, "commit": runs.git_commit(), "preset": preset}
    if not args.naive:
        results |= measure_kernels(device, seconds, args.quick)
    cfg = ladmim.Config(**ladmim.PRESETS[preset] | settings)
    detector, results["masks"] = naive.make_detector(cfg, torch.device(device)), cfg.masks
    with tempfile.TemporaryDirectory() as folder:
        if args.naive:
            count = max(cfg.hvq_batch, cfg.mim_batch, 8)
            render(Path(folder), "breakfast_box", {"train": count}, 256)
            steps = naive.pairs(detector, sorted(Path(folder).glob("*/train/good/*.png")))
        else:
            steps = kernel_steps(detector, device)
        results["steps"] = step_rows(steps, detector, device, seconds)
    text, name = report(results), re.sub(r"\W+", "-", results["device"]).strip("-").lower()
    name += ("-quick" if args.quick else "") + (f"-naive-{preset}" if args.naive else "")
    print(text)
    data.write_whole(args.out / f"{name}.json", (json.dumps(results, indent=1) + "\n").encode())
    data.write_whole(args.out / f"{name}.md", text.encode())
    return 0


def main(argv=None) -> int:
    return data.run_command(lambda: benchmark(parse(argv)), stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())

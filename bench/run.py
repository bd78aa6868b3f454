"""The kernels against plain torch, on whatever machine this is: python bench/run.py

With a GPU the Triton kernels are measured, without one the torch paths. --naive instead times
training and scoring the long way (bench/naive.py) against ours. Prints Markdown tables and writes
them, and the numbers as JSON, to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Otherwise the profiler prints, whatever Python is told. Torch has to see it before it is imported.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
import ladmim  # noqa: E402
import naive  # noqa: E402
import runs  # noqa: E402
from backbone import CHANNELS  # noqa: E402
from kernels import histogram_l1, nearest_code  # noqa: E402
from kernels.dispatch import triton  # noqa: E402
from kernels.histogram_l1 import histogram_l1_reference  # noqa: E402

LEVELS, CODES, TOKENS = 4, 512, 576  # the paper's
PAPER = (36_864, 512, 64)            # T = 64 images of 576 tokens, K codes, D dimensions


# Measuring

def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


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
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    now = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def measure(functions: dict, device: str, seconds: float) -> dict:
    """Turns of one call each, so that a busy moment hits all alike.
    -> name: median and spread in seconds, runs, memory."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    times, memory = {}, {}
    for name, function in functions.items():
        try:
            once(function, device, flush)
            memory[name] = peak_memory(function, device)
            times[name] = []
        except Exception as error:  # a compiler that is missing or does not fit
            print(f"  {name}: not available ({type(error).__name__})", file=sys.stderr)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, times.values())) < 5:
        for name in times:
            times[name].append(once(functions[name], device, flush))
    result = {}
    for name, t in times.items():
        t.sort()
        result[name] = {"median": statistics.median(t), "low": t[len(t) // 10],
                        "high": t[len(t) * 9 // 10], "runs": len(t),
                        "MiB": memory[name] / 2**20}
    return result


def roofline(device: str, seconds: float) -> dict:
    """This machine's ceilings, now: FLOP/s of a large product (float16 on a GPU), bytes/s of a
    large copy."""
    n, dtype, size = 2048, torch.float32, 2**27
    if device == "cuda":
        n, dtype, size = 8192, torch.float16, 2**30
    a, big = torch.randn(n, n, device=device).to(dtype), torch.empty(size, device=device)
    other = torch.empty_like(big)
    best = measure({"product": lambda: a @ a, "copy": lambda: other.copy_(big)}, device, seconds)
    return {"flops": 2 * n**3 / best["product"]["low"], "bytes": 8 * size / best["copy"]["low"]}


def variants(row: dict, result: dict) -> list:
    """The row for each variant, with its speed as a multiple of the fastest plain version's."""
    plain = [r["median"] for name, r in result.items() if not name.startswith("kernels")]
    best = min(plain, default=float("nan"))
    return [{**row, "variant": name, **r, "ratio": best / r["median"]}
            for name, r in result.items()]


def with_roofline(rows: list, flops: float, moved: float, ceiling: dict) -> list:
    """moved: bytes. How near the roofline each row comes."""
    floor = max(flops / ceiling["flops"], moved / ceiling["bytes"])
    for row in rows:
        seconds = row["median"]
        row |= {"GFLOP/s": flops / seconds / 1e9, "GB/s": moved / seconds / 1e9,
                "roofline": floor / seconds}
    return rows


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
    print(f"  {row['shape']}", file=sys.stderr)
    moved = 4 * (T * D + K * D) + 12 * T
    return with_roofline(variants(row, result), 2.0 * T * K * D, moved, ceiling)


def one_hot_histogram(logits, codes, mask):
    one_hot = F.one_hot(codes.long(), logits.shape[-1]).to(logits.dtype)  # (B, L, N, K)
    chosen = mask.expand(len(codes), *mask.shape[-2:]).to(logits.dtype)  # (B, M, N)
    Q = torch.einsum("bmn,blnk->bmlk", chosen, one_hot) / chosen.sum(-1)[..., None, None]
    return (logits.softmax(-1) - Q).abs().sum(-1)


def histogram_calls(variant, logits, codes, mask) -> dict:
    kept = variant(logits, codes, mask).sum()

    def forward():
        with torch.no_grad():
            return variant(logits, codes, mask)

    def backward():
        return torch.autograd.grad(kept, logits, retain_graph=True)

    def both():
        return torch.autograd.grad(variant(logits, codes, mask).sum(), logits)

    return {"forward": forward, "backward": backward, "both": both}


def histogram_rows(device: str, batch: tuple, seconds: float, ceiling: dict) -> list:
    (B, M), rows = batch, []
    logits = torch.randn(B, M, LEVELS, CODES, device=device, requires_grad=True)
    codes = torch.randint(0, CODES, (B, LEVELS, TOKENS), dtype=torch.int16, device=device)
    mask = torch.rand(M, TOKENS, device=device) < 0.4
    calls = {"kernels": histogram_calls(histogram_l1, logits, codes, mask),
             "scatter": histogram_calls(histogram_l1_reference, logits, codes, mask),
             "one-hot": histogram_calls(one_hot_histogram, logits, codes, mask)}
    for mode, passes in (("forward", 1), ("backward", 2), ("both", 4)):
        functions = {name: modes[mode] for name, modes in calls.items()}
        moved = passes * logits.numel() * 4 + codes.numel() * 2 + mask.numel()
        row = {"kernel": "histogram_l1", "shape": f"B={B} M={M}", "mode": mode}
        result = measure(functions, device, seconds)
        rows += with_roofline(variants(row, result), 0.0, moved, ceiling)
    print(f"  histogram {row['shape']}", file=sys.stderr)
    return rows


# Whole steps

KERNELS = {"histogram_l1": histogram_l1, "nearest_code": nearest_code}
PLAIN = {"histogram_l1": histogram_l1_reference,
         "nearest_code": lambda x, codebook: (plain_nearest(x, codebook), None)}


def with_functions(functions: dict, step):
    """`step` with these in the kernels' places."""
    def run():
        for name, function in functions.items():
            setattr(ladmim, name, function)
        step()
    return run


def step_rows(device: str, preset: str, seconds: float, masks: int) -> list:
    """A training step of each stage and scoring, with the kernels and with plain torch."""
    cfg = ladmim.Config(**ladmim.PRESETS[preset] | {"masks": masks})
    detector = naive.make_detector(cfg, torch.device(device))
    hvq, mim = detector.hvq, detector.mim
    h0 = torch.randn(max(cfg.hvq_batch, cfg.mim_batch), cfg.grid**2, CHANNELS, device=device)
    rows = []

    def add(name: str, images: int, step):
        steps = {"kernels": with_functions(KERNELS, step),
                 "plain torch": with_functions(PLAIN, step)}
        for row in variants({"step": f"{name}, {preset}"}, measure(steps, device, seconds)):
            rows.append(row | {"images/s": images / row["median"]})
        steps["kernels"]()  # leaves the kernels in their places

    for_hvq, for_mim = naive.our_losses(detector, h0)
    add("train HVQ-Trans", cfg.hvq_batch, naive.step(*for_hvq, fused=True))
    add("train ViT", cfg.mim_batch, naive.step(*for_mim, fused=True))
    hvq.eval(), mim.eval()
    scored = h0[:min(8, cfg.hvq_batch)]
    add("score", len(scored), lambda: ladmim.errors(hvq, mim, cfg, scored, detector.masks))
    return rows


def naive_rows(device: str, preset: str, size: int, seconds: float) -> list:
    """Each step the long way and ours, in turns, with the same weights and photos."""
    cfg, rows = ladmim.Config(**ladmim.PRESETS[preset] | {"masks": 64}), []
    detector = naive.make_detector(cfg, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        paths = naive.draw_photos(Path(folder), max(cfg.hvq_batch, cfg.mim_batch, 8), size)
        for name, ways in naive.pairs(detector, paths).items():
            detector.hvq.train("HVQ" in name), detector.mim.train("ViT" in name)
            result = measure({way: ways[way][1] for way in ways}, device, seconds)
            each = {way: result[way]["median"] / ways[way][0] for way in result}
            for way, r in result.items():
                ratio = each[way] / each["ours"] if "ours" in each else None
                rows.append({"step": f"{name}, {preset}", "variant": way, "photo": size,
                             "an image": each[way], "images": ways[way][0], "ratio": ratio, **r})
            print(f"  {name}, {preset}", file=sys.stderr)
    return rows


# Tables

def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


FORMATS = {"images/s": "{:.1f}".format, "ratio": "{:.2f}".format, "roofline": "{:.0%}".format,
           "GB/s": "{:.1f}".format, "GFLOP/s": "{:.0f}".format, "MiB": "{:.1f}".format}
FORMATS |= dict.fromkeys(("median", "low", "high", "an image"), duration)


def table(rows: list[dict], *columns) -> str:
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [(FORMATS.get(column, str), row.get(column)) for column in columns]
        lines.append(["" if value is None else form(value) for form, value in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(results: dict) -> str:
    """Everything in Markdown."""
    spread = ("median", "low", "high", "runs", "MiB")
    head = (f"Measured on {results['device']}, {results['versions']}, commit "
            f"{results['commit'] or 'unknown'}. Low and high: a tenth of the runs lies beyond. ")
    if "naive" in results:
        head += "The long way (bench/naive.py) and ours: same weights, in turns. Ratio: to ours."
        return head + "\n\n" + table(results["naive"], "step", "variant", "photo", "an image",
                                     "images", "ratio", *spread) + "\n"
    flops, moved = results["ceiling"]["flops"], results["ceiling"]["bytes"]
    head += (f"Ceilings in this run: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s. "
             "Ratio: speed, as a multiple of the fastest plain version's.")
    parts = [head, table(results["kernels"], "kernel", "shape", "mode", "variant", "ratio", *spread,
                         "GB/s", "GFLOP/s", "roofline", "wrong"),
             table(results["steps"], "step", "variant", "images/s", "ratio", *spread)]
    return "\n\n".join(parts) + "\n"


# Command line

def parse(argv) -> argparse.Namespace:
    parser = data.Parser(prog="bench/run.py",
                         description="Benchmarks the kernels on this machine.")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default 2)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it all run?")
    parser.add_argument("--naive", action="store_true",
                        help="only this: training and scoring the long way, and ours")
    parser.add_argument("--preset", choices=("tiny", "fast", "paper"), default="tiny",
                        help="of --naive (default tiny)")
    parser.add_argument("--photo", type=int, default=256,
                        help="of --naive: pixels a side of the photos (default 256, the rendered "
                             "twin's; MVTec LOCO's have 1000 or more)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    return parser.parse_args(argv)


def measure_kernels(device: str, seconds: float, quick: bool) -> dict:
    shapes = [PAPER, (36_864, 512, 16), (36_864, 512, 256), (36_864, 4096, 64),
              (1_000_000, 512, 64)]
    batches, preset, masks = [(32, 1), (8, 64)], "tiny", 32
    if device == "cuda":
        shapes.append((1_000_000, 8192, 64))
        batches, preset, masks = [(32, 1), (16, 16), (16, 64), (256, 64)], "paper", 64
    if quick:
        shapes, batches, seconds, masks = [(500, 64, 16)], [(2, 3)], 0.1, 2
    ceiling, rows = roofline(device, seconds), []
    for shape in shapes:
        rows += nearest_rows(device, shape, seconds, ceiling)
    for batch in batches:
        rows += histogram_rows(device, batch, seconds, ceiling)
    return {"ceiling": ceiling, "kernels": rows,
            "steps": step_rows(device, preset, seconds, masks)}


def benchmark(args) -> int:
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = (f"torch {torch.__version__}, triton {triton.__version__ if triton else 'none'}, "
                f"Python {platform.python_version()}")
    results = {"device": device_name(device), "versions": versions, "commit": runs.git_commit()}
    name = re.sub(r"\W+", "-", results["device"]).strip("-").lower()
    if args.naive:
        results["naive"] = naive_rows(device, args.preset, args.photo, args.seconds)
        name += f"-naive-{args.preset}"
    else:
        results |= measure_kernels(device, args.seconds, args.quick)
    text = report(results)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    return 0


def main(argv=None) -> int:
    return data.run_command(lambda: benchmark(parse(argv)), stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())

"""The kernels against plain torch, on whatever machine this is: python bench/run.py

With a GPU: the kernels measured. Without one: the torch paths measured, the kernels checked in Triton's interpreter and
compiled for three GPUs, and times predicted from the compiled code. A prediction is never in a table of measurements.
--naive instead times training and scoring the long way against ours.
Prints Markdown tables and writes them, the numbers as JSON and a plot under bench/results/.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import histogram_l1, nearest_code  # noqa: E402
from kernels.histogram_l1 import histogram_l1_reference  # noqa: E402

MODULES = {name: sys.modules[f"kernels.{name}"] for name in ("nearest_code", "histogram_l1")}
PAPER = (36_864, 512, 64)                             # T = 64 images of 576 tokens, K codes, D dimensions
LEVELS, CODES, TOKENS = 4, 512, 576


# Measuring

def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def once(function, device: str, flush=None) -> float:
    """Seconds of one call, on a GPU with its L2 cache flushed before."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    flush.zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    function()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


@contextlib.contextmanager
def silence():
    """The profiler's library writes to the standard error file itself, whatever Python is told."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(function, device: str) -> int:
    """Bytes that one call has allocated at most, beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silence(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def measure(functions: dict, device: str, seconds: float) -> dict:
    """Turns of one call each, so that a busy moment hits all alike. -> name: median and spread in seconds, runs, memory."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    times, memory, first = {}, {}, {}
    for name, function in functions.items():
        try:
            first[name] = once(function, device, flush)
            memory[name] = peak_memory(function, device)
            times[name] = []
        except Exception as error:  # a compiler that is missing or does not fit: said in the table's place
            print(f"  {name}: not available ({type(error).__name__})", file=sys.stderr)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, times.values())) < 5:
        for name in times:
            times[name].append(once(functions[name], device, flush))
    return {name: {"median": statistics.median(t), "low": sorted(t)[len(t) // 10], "high": sorted(t)[len(t) * 9 // 10],
                   "runs": len(t), "memory": memory[name], "first": first[name]} for name, t in times.items()}


def roofline(device: str, seconds: float) -> dict:
    """This machine's ceilings, now: FLOP/s of a large product (float16 on a GPU), bytes/s of a large copy."""
    n, dtype = (8192, torch.float16) if device == "cuda" else (2048, torch.float32)
    a, big = torch.randn(n, n, device=device).to(dtype), torch.empty(2**30 if device == "cuda" else 2**27, device=device)
    other = torch.empty_like(big)
    result = measure({"product": lambda: a @ a, "copy": lambda: other.copy_(big)}, device, seconds)
    return {"flops": 2 * n**3 / result["product"]["low"], "bytes": 2 * big.numel() * 4 / result["copy"]["low"]}


def finish(rows: list, kernel: dict, result: dict, flops: float, moved: float, ceiling: dict):
    """Adds one row a variant: times, ratio to the fastest plain version, and how near the roofline it comes."""
    best = min((r["median"] for name, r in result.items() if name != "kernels"), default=float("nan"))
    for name, r in result.items():
        floor = max(flops / ceiling["flops"], moved / ceiling["bytes"])
        rows.append({**kernel, "variant": name, **r, "ratio": best / r["median"], "flops": flops / r["median"],
                     "bytes": moved / r["median"], "roofline": floor / r["median"]})


# The two kernels

def plain_nearest(x, codebook):
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def wrong_indices(x, codebook, index) -> int:
    """How many indices are not float64's although the two best distances differ by more than 1e-5 relative."""
    wrong, codes = 0, codebook.double()
    for part, chosen in zip(x.split(4096), index.split(4096), strict=True):
        distance = torch.cdist(part.double(), codes, compute_mode="donot_use_mm_for_euclid_dist").square()
        wrong += int((distance.gather(1, chosen[:, None])[:, 0] > distance.amin(1) * (1 + 1e-5)).sum())
    return wrong


def nearest_rows(device: str, shapes: list, seconds: float, ceiling: dict) -> list:
    rows, compiled = [], torch.compile(plain_nearest, dynamic=False)
    for T, K, D in shapes:
        x, codebook = torch.randn(T, D, device=device), torch.randn(K, D, device=device)
        functions = {"kernels": lambda x=x, codebook=codebook: nearest_code(x, codebook)[0]}
        if 3 * T * K * 4 < free_memory(device):
            functions |= {"cdist, argmin": lambda x=x, codebook=codebook: torch.cdist(x, codebook).argmin(1),
                          "addmm, argmin": lambda x=x, codebook=codebook: plain_nearest(x, codebook),
                          "compiled addmm, argmin": lambda x=x, codebook=codebook: compiled(x, codebook)}
        result, checked = measure(functions, device, seconds), 40_000 if device == "cuda" else 2_000
        for name in result:
            result[name]["wrong"] = wrong_indices(x[:checked], codebook, functions[name]()[:checked])
        kernel = {"kernel": "nearest_code", "shape": f"T={T:,} K={K:,} D={D}", "mode": "forward"}
        finish(rows, kernel, result, 2.0 * T * K * D, 4 * (T * D + K * D) + 12 * T, ceiling)
        print(f"  {kernel['shape']}", file=sys.stderr)
    return rows


def one_hot_histogram(logits, codes, mask):
    one_hot = F.one_hot(codes.long(), logits.shape[-1]).to(logits.dtype)  # (B, L, N, K)
    chosen = mask.expand(len(codes), *mask.shape[-2:]).to(logits.dtype)  # (B, M, N)
    Q = torch.einsum("bmn,blnk->bmlk", chosen, one_hot) / chosen.sum(-1)[..., None, None]
    return (logits.softmax(-1) - Q).abs().sum(-1)


def histogram_rows(device: str, shapes: list, seconds: float, ceiling: dict) -> list:
    rows = []
    for B, M in shapes:
        logits = torch.randn(B, M, LEVELS, CODES, device=device, requires_grad=True)
        codes = torch.randint(0, CODES, (B, LEVELS, TOKENS), dtype=torch.int16, device=device)
        mask = torch.rand(M, TOKENS, device=device) < 0.4
        variants = {"kernels": histogram_l1, "scatter": histogram_l1_reference, "one-hot": one_hot_histogram}
        for mode in ("forward", "backward", "both"):
            functions = {}
            for name, variant in variants.items():
                def forward(variant=variant):
                    with torch.no_grad():
                        return variant(logits, codes, mask)

                def both(variant=variant):
                    return torch.autograd.grad(variant(logits, codes, mask).sum(), logits)

                loss = variant(logits, codes, mask).sum()
                functions[name] = {"forward": forward, "both": both, "backward": lambda loss=loss: torch.autograd.grad(
                    loss, logits, retain_graph=True)}[mode]
            moved = logits.numel() * 4 * {"forward": 1, "backward": 2, "both": 4}[mode] + codes.numel() * 2 + mask.numel()
            kernel = {"kernel": "histogram_l1", "shape": f"B={B} M={M}", "mode": mode}
            finish(rows, kernel, measure(functions, device, seconds), 0.0, moved, ceiling)
        print(f"  histogram {kernel['shape']}", file=sys.stderr)
    return rows


# Whole steps

def step_rows(device: str, preset: str, seconds: float, compiling: bool) -> list:
    """Images a second of a training step of each stage and of scoring: with the kernels, with plain torch, and, if asked, a
    training step as `--compile on` has it, whose first call is what compiling costs."""
    import ladmim

    cfg = ladmim.Config(**ladmim.PRESETS[preset])
    torch.manual_seed(0)
    hvq, mim = ladmim.HVQ(cfg, 384).to(device), ladmim.ViT(cfg, 384).to(device)
    h0 = torch.randn(max(cfg.hvq_batch, cfg.mim_batch), cfg.grid**2, 384, device=device)
    with torch.no_grad():
        codes = hvq(h0)[1].to(torch.int16)
    mask = ladmim.draw_masks(cfg, cfg.mim_batch, torch.Generator().manual_seed(0), scoring=False)[:, None].to(device)
    masks = ladmim.scoring_masks(cfg, 0, device)

    def equation12(x, hidden, codes):
        return ladmim.mim_error(mim, mim(x, hidden), x, hidden, codes).mean()

    def train(model, loss, inputs):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def step(loss=loss):
            optimiser.zero_grad()
            loss(*inputs).backward()
            optimiser.step()

        on = dataclasses.replace(cfg, compile="on")
        return step, lambda loss=ladmim.compiled(on, loss, torch.device(device)): step(loss)

    m, scored = cfg.mim_batch, min(8, cfg.hvq_batch)
    steps = {"train HVQ-Trans": (cfg.hvq_batch, *train(hvq, hvq.loss, (h0[:cfg.hvq_batch],))),
             "train ViT": (m, *train(mim, equation12, (h0[:m], mask, codes[:m]))),
             "score": (scored, lambda: ladmim.errors(hvq, mim, cfg, h0[:scored], masks), None)}
    kernels = {"histogram_l1": histogram_l1, "nearest_code": nearest_code}
    plain, rows = {"histogram_l1": histogram_l1_reference, "nearest_code": lambda x, b: (plain_nearest(x, b), None)}, []
    for name, (images, step, compiled_step) in steps.items():
        def using(functions, step):
            for key, function in functions.items():
                setattr(ladmim, key, function)
            step()

        if name == "score":
            hvq.eval(), mim.eval()
        variants = {"kernels": lambda step=step: using(kernels, step), "plain torch": lambda step=step: using(plain, step)}
        if compiling and compiled_step:
            variants["kernels, compiled"] = lambda step=compiled_step: using(kernels, step)
        result = measure(variants, device, seconds)
        using(kernels, step)
        for variant, r in result.items():
            rows.append({"step": f"{name}, {preset}", "variant": variant, "images/s": images / r["median"], **r,
                         "ratio": result["plain torch"]["median"] / r["median"]})
    return rows


def naive_rows(device: str, preset: str, size: int, seconds: float) -> list:
    """Each step the long way (naive.py) and ours, in turns, with the same weights and photos of size x size pixels."""
    import ladmim
    import naive

    cfg, rows = ladmim.Config(**ladmim.PRESETS[preset] | {"masks": 64}), []
    detector = naive.make_detector(cfg, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        paths = naive.draw_photos(Path(folder), max(cfg.hvq_batch, cfg.mim_batch, 8), size)
        for name, ways in naive.pairs(detector, paths).items():
            detector.hvq.train("HVQ" in name), detector.mim.train("ViT" in name)
            result = measure({way: function for way, (_, function) in ways.items()}, device, seconds)
            each = {way: result[way]["median"] / ways[way][0] for way in result}
            rows += [{"step": f"{name}, {preset}", "variant": way, "seconds": each[way], "photo": size, "images": ways[way][0],
                      "ratio": each[way] / each["ours"] if "ours" in each else None, **r} for way, r in result.items()]
            print(f"  {name}, {preset}", file=sys.stderr)
    return rows


# Without a GPU: interpreted, compiled, predicted

def interpret() -> list:
    """Runs in a process of its own, every tensor on its way to Triton's interpreter. -> rows of agreement counts."""
    rows, doubtful, empty = [], [], torch.empty

    def spy(*args, **kwargs):  # the list of doubtful rows is the one allocation of T + 1 int64
        tensor = empty(*args, **kwargs)
        if kwargs.get("dtype") == torch.int64 and args == (T + 1,):
            doubtful.append(tensor)
        return tensor

    for name, T, K, D in (("unrelated", 2048, 512, 64), ("near the codes", 1024, 512, 64), ("unrelated", 256, 4000, 48),
                          ("near ties", 1024, 512, 64), ("far cluster", 512, 512, 64)):
        torch.manual_seed(0)
        x, codebook = torch.randn(T, D), torch.randn(K, D)
        if name == "near the codes":
            x = codebook[torch.randint(K, (T,))] + 0.5 * x
        if name == "near ties":
            a, b = codebook[torch.randint(K, (2, T))]
            x = a + (0.5 - 1e-4) * (b - a)
        if name == "far cluster":
            x, codebook = x + 1e4, codebook + 1e4
        torch.empty = spy
        index = nearest_code(x, codebook)[0]
        torch.empty = empty
        rows.append({"data": name, "shape": f"T={T:,} K={K:,} D={D}", "rows": T, "redone": int(doubtful[-1][0]),
                     "wrong": wrong_indices(x, codebook, index), "worst error": None})
    for B, M in ((2, 8), (4, 1)):
        torch.manual_seed(0)
        logits = (3 * torch.randn(B, M, LEVELS, CODES)).requires_grad_()
        codes, mask = torch.randint(0, CODES, (B, LEVELS, TOKENS), dtype=torch.int16), torch.rand(M, TOKENS) < 0.4
        out, exact = histogram_l1(logits, codes, mask), histogram_l1_reference(logits.double(), codes, mask)
        error = (out - exact).abs().max(), *(a - b for a, b in zip(
            torch.autograd.grad(out.sum(), logits), torch.autograd.grad(exact.sum(), logits), strict=True))
        rows.append({"data": "histogram_l1", "shape": f"B={B} M={M}", "rows": out.numel(), "redone": 0, "wrong": 0,
                     "worst error": max(float(e.abs().max()) for e in error)})
    return rows


POINTERS = {"half": "*fp16", "index": "*i64", "doubtful": "*i64", "codes": "*i16", "mask": "*i1"}
NUMBERS = ("T", "K", "M", "L", "N", "MASK_B")


def compile_for(arch: int, K: int = CODES, D: int = PAPER[2]) -> list:
    """Compiles all kernels for compute capability arch/10, without a GPU -> a row each, from Triton and cuobjdump."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nearest, histogram = MODULES["nearest_code"], MODULES["histogram_l1"]
    sizes, rows = nearest.tile_sizes(K, D), []
    for kernel, constants in ((nearest._prepare, sizes | nearest.PREPARE), (nearest._scan, sizes | nearest.SCAN),
                              (nearest._redo, sizes | nearest.REDO),
                              (histogram._rows, histogram.tile_sizes(K) | {"DIFFERENTIATE": True})):
        constants = dict(constants)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
        signature = {name: "constexpr" if name in constants else "i32" if name in NUMBERS else POINTERS.get(name, "*fp32")
                     for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                   if signature[name].startswith("*") or (name == "K" and K % 16 == 0)}
        values = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        usage, code = dump(binary.asm["cubin"], "-res-usage"), dump(binary.asm["cubin"], "-sass")
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)", code)
        rows.append({"arch": arch, "kernel": kernel.__name__, "K": K, "D": D, "registers": used["REG"],
                     "spills": used["STACK"] + used["LOCAL"] + names.count("LDL") + names.count("STL"),
                     "shared": binary.metadata.shared, "warps": options["num_warps"],
                     "tensor core": sum(name.endswith("MMA") for name in names),
                     "float64": sum(name in ("DADD", "DFMA", "DMUL") for name in names), "loop": loop_of(code)})
    return rows


def dump(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def loop_of(code: str) -> dict:
    """Instructions of the smallest loop that holds tensor-core instructions: what _scan does for each tile of codes."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            body = [re.sub(r"^@!?U?P\w+ ", "", t).split()[0].split(".")[0] for a, t in lines if int(target[1], 16) <= a <= at]
            if any(name.endswith("MMA") for name in body):
                loops.append(body)
    return dict(collections.Counter(min(loops, key=len))) if loops else {}


# Data sheets: multiprocessors, boost clock, float16 tensor FLOP/s (float32 sums), float32 FLOP/s, memory bytes/s.
GPUS = {"RTX 4090": (89, 128, 2.52e9, 165.2e12, 82.6e12, 1.008e12), "H100 SXM": (90, 132, 1.83e9, 989e12, 66.9e12, 3.35e12)}
MODEL = """Model: a kernel's pipes are the tensor cores (2TKD FLOP at the data sheet's float16 rate), the four schedulers of a
multiprocessor (the instructions counted in the compiled loop; FMNMX, LOP3, ISETP, SEL and loads at half rate, the rest at
full rate, tensor-core instructions apart) and memory (bytes at the data sheet's bandwidth). "From" is the busiest pipe
alone, "to" is all of them one after the other; both add 3 us a launch and, for nearest_code, "to" adds 10 us for 4 % of the
rows done again (more where T K is above eight times the paper's, in proportion). The plain version is taken at its best:
products at the full float32 rate, then the (T, K) scores written and read once at full bandwidth."""
LAUNCH, REDO = 3e-6, 10e-6


def predict(compiled: list) -> list:
    rows = []
    for gpu, (arch, processors, clock, tensor, float32, bandwidth) in GPUS.items():
        scan = next(row for row in compiled if row["arch"] == arch and row["kernel"] == "_scan")
        slow = sum(n for name, n in scan["loop"].items() if name in ("FMNMX", "LOP3", "ISETP", "SEL", "LDG", "LDSM"))
        cycles = slow * 2 + sum(n for name, n in scan["loop"].items() if not name.endswith("MMA")) - slow
        for T, K, D in (PAPER, (1_000_000, 8192, 64)):
            issue = -(-T // 64) * -(-K // 64) * scan["warps"] * cycles / (4 * processors * clock)
            pipes = 2 * T * K * D / tensor, issue, (4 * T * D + 12 * T) / bandwidth
            redo = REDO * max(1, T * K / (PAPER[0] * PAPER[1]) / 8)
            plain = 2 * T * K * D / float32 + 8 * T * K / bandwidth + 2 * LAUNCH
            rows.append({"GPU": gpu, "kernel": "nearest_code", "shape": f"T={T:,} K={K:,} D={D}",
                         "from": max(pipes) + 3 * LAUNCH, "to": sum(pipes) + 3 * LAUNCH + redo, "plain": plain,
                         "busiest": ("tensor cores", "schedulers", "memory")[pipes.index(max(pipes))]})
        for B, M in ((32, 1), (16, 64)):
            for mode, passes, plain_passes, launches, plain_launches in (("forward", 1, 9, 1, 10), ("both", 4, 19, 2, 22)):
                size = B * M * LEVELS * CODES * 4 / bandwidth
                rows.append({"GPU": gpu, "kernel": f"histogram_l1 {mode}", "shape": f"B={B} M={M}",
                             "from": passes * size + launches * LAUNCH, "to": 2 * passes * size + launches * LAUNCH,
                             "plain": plain_passes * size + plain_launches * LAUNCH, "busiest": "launch" if size < LAUNCH
                             else "memory"})
    return rows


# Reporting

def table(rows: list, columns: dict) -> str:
    """columns: title -> function of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(f(row)) for f in columns.values()) + " |" for row in rows])


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def tables(results: dict) -> str:
    spread = {"median": lambda r: duration(r["median"]), "10-90 %": lambda r: f"{duration(r['low'])} - {duration(r['high'])}",
              "runs": lambda r: r["runs"], "times the best plain": lambda r: f"{r['ratio']:.2f}",
              "memory": lambda r: f"{r['memory'] / 2**20:.1f} MiB"}
    speed = {"GB/s": lambda r: f"{r['bytes'] / 1e9:.1f}", "GFLOP/s": lambda r: f"{r['flops'] / 1e9:.0f}",
             "of roofline": lambda r: f"{r['roofline']:.0%}", "wrong": lambda r: r.get("wrong", "")}
    head = f"Measured on {results['device']}, {results['versions']}, commit {results['commit'] or 'unknown'}."
    if "naive" in results:
        return "\n\n".join([f"{head} Every step the long way (bench/naive.py) and ours: same weights, in turns.", table(
            results["naive"], {"step": lambda r: r["step"], "way": lambda r: r["variant"],
                               "photo": lambda r: f"{r['photo']}x{r['photo']}",
                               "time an image": lambda r: duration(r["seconds"]), "images a call": lambda r: r["images"],
                               "times ours": lambda r: "" if r["ratio"] is None else f"{r['ratio']:.1f}",
                               **{c: spread[c] for c in ("median", "10-90 %", "runs", "memory")}})]) + "\n"
    flops, moved = results["ceiling"]["flops"], results["ceiling"]["bytes"]
    parts = [f"{head} Ceilings in this run: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s.",
             table(results["kernels"], {"kernel": lambda r: r["kernel"], "shape": lambda r: r["shape"],
                                        "mode": lambda r: r["mode"], "variant": lambda r: r["variant"], **spread, **speed}),
             table(results["steps"], {"step": lambda r: r["step"], "variant": lambda r: r["variant"],
                                      "images/s": lambda r: f"{r['images/s']:.1f}", **spread,
                                      "first call": lambda r: f"{r['first']:.1f} s"})]
    if "interpreted" in results:
        parts += ["Checked in Triton's interpreter against float64: rows, rows done again, wrong indices, worst error.",
                  table(results["interpreted"], {c: lambda r, c=c: "" if r[c] is None else f"{r[c]:.1e}" if c == "worst error"
                                                 else r[c] for c in results["interpreted"][0]})]
    if "compiled" in results:
        columns = [c for c in results["compiled"][0] if c != "loop"]
        parts += ["Compiled, not run.", table(results["compiled"], {c: lambda r, c=c: r[c] for c in columns}),
                  "**Predicted, not measured.** " + MODEL,
                  table(results["predicted"], {"GPU": lambda r: r["GPU"], "kernel": lambda r: r["kernel"],
                                               "shape": lambda r: r["shape"], "from": lambda r: duration(r["from"]),
                                               "to": lambda r: duration(r["to"]), "plain torch": lambda r: duration(r["plain"]),
                                               "times": lambda r: f"{r['plain'] / r['to']:.1f} - {r['plain'] / r['from']:.1f}",
                                               "busiest": lambda r: r["busiest"]})]
    return "\n\n".join(parts) + "\n"


def plot(results: dict, path: Path):
    """A bar a row of measurements: how many times the fastest plain version's speed."""
    rows = [row for row in results["kernels"] if row["variant"] == "kernels" and row["ratio"] == row["ratio"]]
    width, line, left, top = 960, 26, 390, 60
    image = Image.new("RGB", (width, top + line * len(rows) + 20), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    unit = (width - left - 70) / max([1.0, *(row["ratio"] for row in rows)])
    draw.text((10, 8), f"Speed, as a multiple of the fastest plain torch version (line: 1), {results['device']}", "black", font)
    for i, row in enumerate(rows):
        y = top + i * line
        draw.text((10, y), f"{row['kernel']} {row['shape']} {row['mode']}", "black", font)
        draw.rectangle((left, y, left + unit * row["ratio"], y + line - 8), "#3b6ea5")
        draw.text((left + unit * row["ratio"] + 6, y), f"{row['ratio']:.2f}", "black", font)
    draw.line((left + unit, top - 8, left + unit, top + line * len(rows)), "black")
    image.save(path)


def write(results: dict, folder: Path, name: str):
    text = tables(results)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)


def versions() -> str:
    triton = MODULES["nearest_code"].triton
    return f"torch {torch.__version__}, triton {triton.__version__ if triton else 'none'}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmarks the kernels on this machine.")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default 2)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it all run?")
    parser.add_argument("--naive", action="store_true", help="only this: training and scoring the long way, and ours")
    parser.add_argument("--preset", choices=("tiny", "fast", "paper"), default="tiny", help="of --naive (default tiny)")
    parser.add_argument("--photo", type=int, default=256, help="of --naive: pixels a side of the photos (default 256, the "
                                                               "rendered twin's; MVTec LOCO's have 1000 or more)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.compiler.config.force_disable_caches = True                             # compiling costs what it costs a new user
    if args.interpret:
        print(json.dumps(interpret()))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [PAPER, (36_864, 512, 16), (36_864, 512, 256), (36_864, 4096, 64), (1_000_000, 512, 64)]
    batches = [(32, 1), (8, 64)]
    if device == "cuda":
        shapes, batches = [*shapes, (1_000_000, 8192, 64)], [(32, 1), (16, 16), (16, 64), (256, 64)]
    if args.quick:
        shapes, batches, args.seconds = [(500, 64, 16)], [(2, 3)], 0.1
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    name = re.sub(r"\W+", "-", device_name(device)).strip("-").lower()
    results = {"device": device_name(device), "versions": versions(), "commit": commit.stdout.strip()}
    if args.naive:
        results["naive"] = naive_rows(device, args.preset, args.photo, args.seconds)
        write(results, args.out, f"{name}-naive-{args.preset}")
        return 0
    ceiling = roofline(device, args.seconds)
    results |= {"ceiling": ceiling,
                "kernels": nearest_rows(device, shapes, args.seconds, ceiling)
                + histogram_rows(device, batches, args.seconds, ceiling),
                "steps": step_rows(device, "paper" if device == "cuda" else "tiny", args.seconds, not args.quick)}
    if device == "cpu" and MODULES["nearest_code"].triton:
        environment = os.environ | {"LADMIM_KERNELS": "triton", "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, __file__, "--interpret"], env=environment, stdout=subprocess.PIPE, check=True)
        results["interpreted"] = json.loads(done.stdout)
        results["compiled"] = [row for arch in ((89, 90) if args.quick else (80, 89, 90)) for row in compile_for(arch)]
        results["predicted"] = predict(results["compiled"])
    write(results, args.out, name)
    plot(results, args.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

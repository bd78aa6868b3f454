"""The kernels where there is no GPU, for bench/run.py: compiled, and their times predicted.

They are compiled for compute capability 8.0, 8.9 and 9.0, with the registers and spills that the
compiler reports. nearest_code's times are predicted from the compiled instructions. A prediction
is never in a table of measurements.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.dispatch import triton  # noqa: E402

PAPER = (36_864, 512, 64)  # T = 64 images of 576 tokens, K codes, D dimensions


# Compiled

POINTERS = {"half": "*fp16", "index": "*i64", "doubtful": "*i64", "codes": "*i16", "mask": "*i1"}
NUMBERS = ("T", "K", "M", "L", "N", "MASK_B")


def compile_for(arch: int, K: int = PAPER[1], D: int = PAPER[2]) -> list:
    """All kernels for compute capability arch / 10, compiled without a GPU -> a row each."""
    nearest, histogram = map(import_module, ("kernels.nearest_code", "kernels.histogram_l1"))
    sizes = nearest.tile_sizes(K, D)
    kernels = [(nearest._prepare, sizes | nearest.PREPARE), (nearest._scan, sizes | nearest.SCAN),
               (nearest._redo, sizes | nearest.REDO),
               (histogram._rows, histogram.tile_sizes(K) | {"DIFFERENTIATE": True})]
    rows = []
    for kernel, settings in kernels:
        binary = compile_kernel(kernel, settings, arch, K)
        usage = dump(binary.asm["cubin"], "-res-usage")
        code = dump(binary.asm["cubin"], "-sass")
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)", code)
        spills = used["STACK"] + used["LOCAL"] + names.count("LDL") + names.count("STL")
        rows.append({"arch": arch, "kernel": kernel.__name__, "K": K, "D": D,
                     "registers": used["REG"], "spills": spills,
                     "shared": binary.metadata.shared, "warps": settings["num_warps"],
                     "tensor core": sum(name.endswith("MMA") for name in names),
                     "float64": sum(name in ("DADD", "DFMA", "DMUL") for name in names),
                     "loop": loop_of(code)})
    return rows


def compile_kernel(kernel, settings: dict, arch: int, K: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in settings:
            signature[name], constants[(i,)] = "constexpr", settings[name]
        else:
            signature[name] = "i32" if name in NUMBERS else POINTERS.get(name, "*fp32")
        if signature[name].startswith("*") or (name == "K" and K % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]  # as a launch would find and use
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in settings.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop_of(code: str) -> dict:
    """Instructions of the smallest loop that holds tensor-core instructions: what _scan does for
    each tile of codes."""
    lines = []  # (address, instruction)
    for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code):
        lines.append((int(at, 16), text))
    loops = []
    for end, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        start = int(target[1], 16) if target else end
        if start < end:
            inside = [text for at, text in lines if start <= at <= end]
            names = [re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in inside]
            if any(name.endswith("MMA") for name in names):
                loops.append(names)
    return dict(collections.Counter(min(loops, key=len))) if loops else {}


# Predicted

# Of the data sheets: multiprocessors, boost clock (Hz), products in float16 on tensor cores with
# sums in float32 (FLOP/s), in float32 (FLOP/s), memory (bytes/s).
GPUS = {"RTX 4090": (89, 128, 2.52e9, 165.2e12, 82.6e12, 1.008e12),
        "H100 SXM": (90, 132, 1.83e9, 989e12, 66.9e12, 3.35e12)}
HALF_RATE = ("FMNMX", "LOP3", "ISETP", "SEL", "LDG", "LDSM")
LAUNCH, REDO = 3e-6, 10e-6  # seconds
MODEL = """Model: nearest_code's pipes are the tensor cores (2TKD FLOP at the data sheet's rate),
the four schedulers of a multiprocessor (the instructions counted in the compiled loop; FMNMX, LOP3,
ISETP, SEL and loads at half rate, the rest at full rate, tensor-core instructions apart) and memory
(bytes at the data sheet's bandwidth). "From" is the busiest pipe alone, "to" is all of them one
after the other; both add 3 us a launch, and "to" adds 10 us for 4 % of the rows done again (more
where T K is above eight times the paper's, in proportion). The plain version is taken at its best:
products at the full float32 rate, then the (T, K) scores written and read once."""


def predict(compiled: list) -> list:
    """compiled: rows of `compile_for`."""
    scans = {row["arch"]: row for row in compiled if row["kernel"] == "_scan"}
    rows = []
    for name, (arch, *sheet) in GPUS.items():
        for shape in (PAPER, (1_000_000, 8192, 64)):
            rows.append({"GPU": name, **predict_nearest(scans[arch], *shape, *sheet)})
    return rows


def predict_nearest(scan: dict, T: int, K: int, D: int, processors: int, clock: float,
                    tensor: float, float32: float, bandwidth: float) -> dict:
    cycles = 0
    for name, n in scan["loop"].items():
        if not name.endswith("MMA"):
            cycles += 2 * n if name in HALF_RATE else n
    tiles = -(-T // 64) * -(-K // 64)
    pipes = {"tensor cores": 2 * T * K * D / tensor,
             "schedulers": tiles * scan["warps"] * cycles / (4 * processors * clock),
             "memory": (4 * T * D + 12 * T) / bandwidth}
    low = max(pipes.values()) + 3 * LAUNCH
    high = sum(pipes.values()) + 3 * LAUNCH + REDO * max(1, T * K / (PAPER[0] * PAPER[1]) / 8)
    plain = 2 * T * K * D / float32 + 8 * T * K / bandwidth + 2 * LAUNCH
    return {"shape": f"T={T:,} K={K:,} D={D}", "from": low, "to": high, "plain": plain,
            "times": f"{plain / high:.1f} - {plain / low:.1f}",
            "busiest": max(pipes, key=pipes.get)}

"""The kernels compiled for three GPUs, without one: registers, shared memory, no spills."""
import re
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from kernels.dispatch import triton

pytestmark = pytest.mark.skipif(triton is None, reason="triton has no build for this system")
POINTERS = {"half": "*fp16", "index": "*i64", "doubtful": "*i64", "codes": "*i16", "mask": "*i1"}
NUMBERS = ("T", "K", "M", "L", "N", "MASK_B")


def compile_for(arch: int, K: int = 512, D: int = 64) -> list:
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
                     "float64": sum(name in ("DADD", "DFMA", "DMUL") for name in names)})
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


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("K, D", [(512, 64), (4000, 300)])
def test_no_kernel_spills_and_products_use_tensor_cores(arch, K, D):
    rows = compile_for(arch, K, D)
    assert {row["kernel"] for row in rows} == {"_prepare", "_scan", "_redo", "_rows"}
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255
        assert row["shared"] <= 99 * 1024            # what one program may have on all of them
        assert (row["tensor core"] > 0) == (row["kernel"] in ("_scan", "_redo"))

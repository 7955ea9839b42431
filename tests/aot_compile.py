"""Compile Triton kernels for GPUs that are not here and print what came out, as JSON.

Run by test_aot.py in a process of its own: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from robustft_kernels import answer_consistency_triton as consistency
from robustft_kernels import gradient_triton, partials_triton
from robustft_kernels import linear_token_stats_triton as linear
from robustft_kernels import token_stats_triton as logits

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("target_ptr", "argmax_ptr", "rank_ptr", "best_ptr", "place_ptr"), "*i64"),
    **dict.fromkeys(("rate", "inverse", "cap"), "fp32"),
    **dict.fromkeys(("inner_stride", "outer_stride", "hidden_stride", "weight_stride"), "i64"),
    **dict.fromkeys(("out_outer_stride", "out_inner_stride"), "i64"),
    **dict.fromkeys(("base", "out_base", "ignore_index"), "i64"),
}


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: str, **options: int):
    """Compile as the launcher would: pointers and what `types` marks with ! divide by 16."""
    names = kernel.arg_names
    signature, divisible = {}, []
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = (
            types.get(name) or POINTERS.get(name) or ("*fp32" if name.endswith("_ptr") else "i32")
        )
        if kind.startswith("*") or kind.endswith("!"):
            divisible.append(i)
        signature[name] = kind.rstrip("!")
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    options = {"enable_fp_fusion": True, **options}
    return triton.compile(source, target=TARGETS[arch], options=options)


def facts(compiled: Any, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory, and the loads, stores and matrix instructions.

    "shuffles": those of each loop over what is read once, on NVIDIA.
    """
    if arch == "gfx942":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        found = re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+|v_mfma\w+|scratch_\w+)", text)
        return {
            "registers": field("vgpr_count"),
            "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
            "shared": compiled.metadata.shared,
            "instructions": Counter(found),
        }
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def ask(flag: str) -> str:
            command = [str(tools / "cuobjdump"), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = ask("-res-usage"), ask("-sass")
    loops = [body for body in loop_bodies(sass) if "LDG.E.EF" in body]
    registers = re.search(r"REG:(\d+)", usage).group(1)
    found = re.findall(
        r"\b(LDG\.[\w.]+|LDGSTS\.[\w.]+|STG\.[\w.]+|HMMA|HGMMA|UTMALDG|UTC\w*MMA|STL|LDL)", sass
    )
    return {
        "registers": int(registers),
        "spills": found.count("STL") + found.count("LDL"),
        "shared": compiled.metadata.shared,
        "instructions": Counter(found),
        "shuffles": [body.count("SHFL") for body in loops],
    }


def loop_bodies(sass: str) -> list[str]:
    """The instructions between each branch backwards and where it goes."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    listing = [(int(address, 16), text) for address, text in lines]
    bodies = []
    for address, text in listing:
        goal = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if goal and int(goal.group(1), 16) < address:
            start = int(goal.group(1), 16)
            bodies.append("\n".join(line for at, line in listing if start <= at <= address))
    return bodies


def logits_kernel(arch: str, dtype: str, capped: bool, target: bool) -> Any:
    group = {"bf16": 8, "fp16": 8, "fp32": 4}[dtype]
    tile = logits.tile_shape(16 // group, capped, TARGETS[arch].warp_size)
    warps = tile.pop("num_warps")
    pairs = target and dtype == "bf16" and arch in ("sm_90", "sm_100")
    constants = {"HAS_TARGET": target, "GIVEN": False, "CAPPED": capped, "CHUNK": logits.CHUNK}
    constants |= {"ALIGN": 8 * group, "PAIRS": pairs, "WHOLE": True, **tile}
    types = {"x_ptr": "*" + dtype}
    return build(logits.partial_kernel, types, constants, arch, num_warps=warps)


def linear_kernel(arch: str, dtype: str, capped: bool) -> Any:
    name = arch if arch == "gfx942" else int(arch.removeprefix("sm_"))
    tile = linear.tile_shape(capped, name)
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    types = {"bias_ptr": "*" + dtype, "width": "i32!"}
    types |= {"hidden_stride": "i64!", "weight_stride": "i64!"}
    for operand, block in (("hidden", "BLOCK_N"), ("weight", "BLOCK_V")):
        shape = f"[{tile[block]}, {tile['BLOCK_D']}]"
        types[operand] = f"tensordesc<{dtype}{shape}>" if tile["TMA"] else "*" + dtype
    constants = {
        "HAS_TARGET": True,
        "HAS_BIAS": capped,
        "CAPPED": capped,
        "CHUNK": linear.chunk_of(128256, tile["BLOCK_V"], 132),
    }
    return build(linear.linear_partial_kernel, types, constants | tile, arch, **options)


def finish_kernel(arch: str) -> Any:
    constants = {"HAS_TARGET": True, "CAPPED": False, "BLOCK": 128}
    return build(partials_triton.finish_kernel, {}, constants, arch)


def backward_kernel(arch: str, dtype: str, capped: bool) -> Any:
    align = {"bf16": 8, "fp16": 8, "fp32": 4}[dtype]
    constants = {"HAS_TARGET": True, "CAPPED": capped, "ALIGN": align}
    constants |= {"BLOCK": gradient_triton.BLOCK}
    types = {"x_ptr": "*" + dtype, "out_ptr": "*" + dtype}
    return build(gradient_triton.backward_kernel, types, constants, arch, num_warps=8)


def compilations(kernel: Any, arch: str) -> int:
    """How many times the launcher would compile for batches of several sizes and layouts."""
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(TARGETS[arch])
    )
    fixed = {"width": 4096, "hidden_stride": 4096, "weight_stride": 4096, "stride": 1}
    keys = set()
    for number in (1, 3, 16, 1 << 20):
        values: dict[str, Any] = {}
        for param in kernel.params:
            name = param.name
            if param.is_constexpr:
                values[name] = 0
            elif name in ("rate", "inverse", "cap", "threshold"):
                values[name] = 1.0
            elif name == "target_ptr":  # a slice of a batch's targets lies anywhere
                values[name] = torch.empty(8, dtype=torch.int64)[number % 2 :]
            elif name.endswith("_ptr") or name in ("hidden", "weight"):
                values[name] = torch.empty(8)
            else:
                large = "stride" in name or name.endswith("base")
                values[name] = fixed.get(name, number << 15 if large else number)
        keys.add(str(bind(**values)[1]))
    return len(keys)


def main(arch: str, everything: bool) -> None:
    """Print one JSON object: kernel name -> facts."""
    made = {
        "logits bf16": logits_kernel(arch, "bf16", False, True),
        "logits fp32": logits_kernel(arch, "fp32", False, True),
        "linear bf16": linear_kernel(arch, "bf16", False),
        "backward bf16": backward_kernel(arch, "bf16", False),
    }
    if everything:
        made |= {
            "logits fp16": logits_kernel(arch, "fp16", False, True),
            "logits bf16 without target": logits_kernel(arch, "bf16", False, False),
            "logits bf16 capped": logits_kernel(arch, "bf16", True, True),
            "logits fp32 capped": logits_kernel(arch, "fp32", True, True),
            "linear bf16 capped": linear_kernel(arch, "bf16", True),
            "linear fp16": linear_kernel(arch, "fp16", False),
            "finish": finish_kernel(arch),
            "backward bf16 capped": backward_kernel(arch, "bf16", True),
            "backward fp32": backward_kernel(arch, "fp32", False),
        }
    print(json.dumps({name: facts(kernel, arch) for name, kernel in made.items()}))


if __name__ == "__main__":
    if "--compilations" in sys.argv:
        kernels = (
            logits.partial_kernel,
            gradient_triton.backward_kernel,
            linear.linear_partial_kernel,
            linear.target_logit_kernel,
            partials_triton.finish_kernel,
            consistency.pairwise_kernel,
            consistency.summarise_kernel,
        )
        print(json.dumps({k.fn.__name__: compilations(k, sys.argv[1]) for k in kernels}))
    else:
        main(sys.argv[1], "--all" in sys.argv)

"""Build, test and measure on a machine with a GPU, inside a time budget: `make gpu-check`.

    BUDGET_S=540 OUT=build/gpu-check PARTS=build,tests,ops python benchmarks/gpu/check.py

Objects that are in build/gpu already, from the same sources, options and compiler, are only linked: PARTS=build on a
machine without a GPU compiles them for INLAY_GPU_ARCH (sm_90a), to be carried to one that is paid by the second.

Wants CUDA, torch, transformers and a C++ compiler; nothing is downloaded, nothing outside build/ is written. Parts
run in the order of PARTS, each in processes of its own, and gpu_check.json is written after each. A part that cannot
run (no GPU, no time, a missing package) is "not run" with the reason; only what ran and failed is "failed".
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package, as links, and the module built here
# Without a build it is the package with plain torch; packages that were carried come last.
PATH = os.pathsep.join(filter(None, [str(SITE), str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
BUDGET = float(os.environ.get("BUDGET_S") or 540)
STARTED = time.monotonic()


class NotRun(Exception):
    """Why a part was not run."""


def left() -> float:
    return BUDGET - (time.monotonic() - STARTED)


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def wanted(*packages: str) -> None:
    missing = [package for package in packages if not has(package)]
    if missing:
        raise NotRun(f"not installed: {', '.join(missing)}")


def present_gpu() -> str | None:
    """The architecture of the first GPU, as nvcc names it; None without one."""
    if not has("torch"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def need_gpu() -> None:
    if present_gpu() is None:
        raise NotRun("no GPU visible to torch")
    if not list((SITE / "inlay").glob("_C*")):
        raise NotRun("the build did not succeed")


def run(command: list[str], most: float, **variables: str) -> str:
    """Output of a command that may take `most` seconds of what is left; raises on failure."""
    seconds = min(most, left())
    if seconds < 5:
        raise NotRun("no time left")
    environment = {**os.environ, "PYTHONPATH": PATH, "HF_HUB_OFFLINE": "1", **variables}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT, start_new_session=True
    )
    try:
        said, complained = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would keep the GPU's memory
        said, complained = process.communicate()
        raise RuntimeError(f"stopped after {seconds:.0f} s\n{(said + complained)[-2000:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}\n{(said + complained)[-4000:]}")
    return said


# --- build ------------------------------------------------------------------------------------------------------------


def pybind11_headers() -> Path:
    """Its own package, or the copy that torch brings."""
    if has("pybind11"):
        import pybind11

        return Path(pybind11.get_include())
    import torch

    return Path(torch.__file__).parent / "include"


def compile_commands(arch: str) -> dict[Path, list[str]]:
    """Object file -> command. CPU kernels are scalar only: they are not what is measured here."""
    sources = (ROOT / "cuda" / "sources.cmake").read_text()
    options = re.search(r"INLAY_NVCC_OPTIONS (.*)\)", sources)[1].split()
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'cuda'}"]
    host = ["g++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", *include]
    host += [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11_headers()}", f'-DINLAY_HAVE_CUDA="{arch}"']
    host += ['-DINLAY_COMPILER="gpu-check"', "-DINLAY_HAVE_scalar"]
    device = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-Xcompiler",
        "-fPIC",
        *options,
        f"-arch={arch}",
        "-DINLAY_HAVE_CUDA",
        *include,
    ]
    commands = {}
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/entries/*.cpp")]):
        commands[source] = host
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        commands[source] = [*host, "-DINLAY_ISA_NS=scalar", "-DINLAY_VEC_scalar"]
    for source in sorted(ROOT.glob("cuda/*.cu")):
        commands[source] = device
    return {
        BUILD / f"{source.parent.name}_{source.stem}.o": [*command, "-c", str(source)]
        for source, command in commands.items()
    }


@functools.cache
def sources_digest() -> str:
    """Of every file that an object can be made from, with its name."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*.*") if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def fingerprint(command: list[str]) -> str:
    """Of what an object is made from: sources, options, the compiler's and Python's version; not where they lie."""
    version = nvcc_version() if command[0] == "nvcc" else command[0]  # host objects of any g++ link
    options = [word for word in command if not word.startswith("-I") and str(ROOT) not in word]
    made_from = (sources_digest(), options, version, sys.version_info[:2])
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def compile_objects(commands: dict[Path, list[str]]) -> int:
    """Objects that are not there yet; how many were."""
    stamps = {target: fingerprint(command) for target, command in commands.items()}

    def compile_one(target: Path) -> int:
        stamp = target.with_suffix(".sha256")
        if target.exists() and stamp.exists() and stamp.read_text() == stamps[target]:
            return 1
        run([*commands[target], "-o", str(target)], 300)
        stamp.write_text(stamps[target])
        return 0

    workers = int(os.environ.get("BUILD_JOBS") or os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(compile_one, commands))


#: An editable install of this package is found before anything on PYTHONPATH.
_NOT_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "inlay" not in getattr(f, "known_source_files", ())]
"""


def build() -> dict[str, Any]:
    for tool in ("nvcc", "g++"):
        if not shutil.which(tool):
            raise NotRun(f"no {tool} on PATH")
    gpu = present_gpu()
    if gpu and int(re.findall(r"\d+", gpu)[0]) < 80:
        raise NotRun(f"wanted a GPU of sm_80 or newer, got {gpu}")
    arch = gpu or os.environ.get("INLAY_GPU_ARCH") or "sm_90a"
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "inlay").mkdir(parents=True)
    for entry in (ROOT / "python" / "inlay").iterdir():
        if not entry.name.startswith(("_C", "__pycache__")):
            (SITE / "inlay" / entry.name).symlink_to(entry)
    (SITE / "sitecustomize.py").write_text(_NOT_EDITABLE)
    commands = compile_commands(arch)
    found = compile_objects(commands)
    target = SITE / "inlay" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(["nvcc", "-shared", "-cudart", "static", "-o", str(target), *map(str, commands)], 120)
    if gpu is None and not has("torch"):
        return {"arch": arch, "gpu": "none: compiled and linked", "carried objects": f"{found} of {len(commands)}"}
    loaded = run([sys.executable, "-c", "import inlay._C; print(inlay._C.__file__)"], 120).strip()
    if Path(loaded) != target:
        raise RuntimeError(f"wanted {target}, Python imports {loaded}; uninstall inlay here")
    said = run([sys.executable, "-m", "inlay.doctor"], 120)
    return {
        "arch": arch,
        "gpu": gpu or "none: compiled, imported, not run",
        "carried objects": f"{found} of {len(commands)}",
        "doctor": said.splitlines(),
    }


# --- tests ------------------------------------------------------------------------------------------------------------

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/simt/test_kernels_*.py"))
WHERE = ["tests/gpu", *KERNELS]
#: One kernel each of every kind, at shapes small enough for a tool that slows each access by a hundred.
SMALL = " or ".join(
    f"({test} and {case})"
    for test, case in (
        ("test_rms_norm", "5-203"),
        ("test_adamw", "shapes0"),
        ("test_adamw_8bit", "sizes0"),
        ("test_submatrix_grad", "257-200"),
        ("test_lora_backward", "257-200"),
        ("test_dequantize_4bit_stack", "77-32"),
        ("test_adamw_bf16", "sizes0"),
        ("test_quantized_linear", "48-256"),
        ("test_quantized_linear", "5-3648"),  # blocks share a tile
        ("test_quantized_lora_linear", "48-256"),
        ("test_cross_entropy", "113"),
    )
)


def tests() -> dict[str, Any]:
    wanted("pytest")
    selected = run([*PYTEST, "--collect-only", *WHERE], 120).strip().splitlines()[-1]
    if present_gpu() is None:
        raise NotRun(f"no GPU visible to torch; selected: {selected}")
    need_gpu()
    workers = ["-n", "8"] if has("xdist") else []  # most of a test is its inputs and reference on the CPU
    said = run([*PYTEST, *workers, *WHERE], 240)
    return {"selected": selected, "said": said.strip().splitlines()[-1]}


def sanitizer() -> dict[str, Any]:
    wanted("pytest")
    need_gpu()
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise NotRun("no compute-sanitizer on PATH")
    result = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *PYTEST, *KERNELS, "-k", SMALL]
        try:
            result[check] = run(command, 60).strip().splitlines()[-1]
        except RuntimeError as error:
            refused = re.search(r".*(?:not supported|not permitted|permission|Unable to|stopped after).*", str(error))
            if not refused:
                raise
            result[check] = f"not run: {refused[0].strip()}"
    return result


# --- benchmarks -------------------------------------------------------------------------------------------------------


def measured(script: str, name: str, most: float, *options: str) -> dict[str, Any]:
    need_gpu()
    target = OUT / f"{name}.json"
    target.unlink(missing_ok=True)
    try:
        said = run([sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(target)], most)
    except RuntimeError:
        if not target.exists():
            raise
        said = "stopped early; what was measured until then is kept"
    return {"file": target.name, "said": said.splitlines()[-40:]}


def installed(methods: str) -> str:
    """Without the methods whose packages are not here."""
    needs = {"peft-lora": ["peft"], "peft-qlora": ["peft", "bitsandbytes"]}
    needs |= {"unsloth-lora": ["unsloth"], "unsloth-qlora": ["unsloth", "bitsandbytes"]}
    kept = [method for method in methods.split(",") if all(has(package) for package in needs.get(method, []))]
    if not any(method.startswith("inlay") for method in kept):
        raise NotRun(f"of {methods} none of ours can run")
    return ",".join(kept)


def train(model: str, batch: int, seq: int, methods: str, most: float) -> dict[str, Any]:
    need_gpu()
    options = ["--device", "cuda", "--model", model, "--batch", str(batch), "--seq", str(seq), "--steps", "5"]
    kind = "unsloth" if "unsloth" in methods else "nf4" if "qlora" in methods else "bf16"
    name = f"train_step_{model}_{batch}x{seq}_{kind}"
    return measured("train_step.py", name, most, *options, "--methods", installed(methods))


def beside_unsloth() -> dict[str, Any]:
    """A part of its own: what keeps Unsloth from running is a reason, not a failure of ours."""
    wanted("unsloth", "bitsandbytes")
    try:
        return train("llama-8b", 1, 8192, "inlay-qlora,unsloth-qlora", 240)
    except RuntimeError as error:
        raise NotRun(f"not compared: {str(error)[-500:]}") from None


DENSE, PACKED = "inlay-s2ft,peft-lora,full,inlay-lora", "inlay-qlora,peft-qlora,inlay-s2ft-nf4"
DECODE = ["--device", "cuda", "--model", "llama-8b", "--tokens", "32", "--runs", "3"]
#: In the order of importance; the budget cuts off the end.
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "build": build,
    "tests": tests,
    "train-1b": lambda: train("llama-1b", 4, 2048, DENSE, 120),
    "train-1b-nf4": lambda: train("llama-1b", 4, 2048, PACKED, 120),
    "ops": lambda: measured("gpu/ops.py", "ops", 90, "--seconds", "75"),
    "train-8b": lambda: train("llama-8b", 1, 8192, DENSE, 200),
    "train-8b-nf4": lambda: train("llama-8b", 1, 8192, PACKED, 200),
    "decode": lambda: measured(
        "generate.py", "generate_llama-8b", 120, *DECODE, "--methods", installed("inlay-qlora,peft-qlora")
    ),
    "train-8b-unsloth": beside_unsloth,
    "train-8b-4x2048": lambda: train("llama-8b", 4, 2048, DENSE, 200),
    "sanitizer": sanitizer,
}


def main() -> int:
    names = [name for name in os.environ.get("PARTS", "").split(",") if name] or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"PARTS: wanted some of {', '.join(PARTS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"budget_s": BUDGET, "gpu": present_gpu(), "parts": {}}
    for name in PARTS:
        began, entry = time.monotonic(), {}
        try:
            if name not in names:
                raise NotRun("not asked for")
            entry = {"status": "passed", **PARTS[name]()}
        except NotRun as reason:
            entry = {"status": "not run", "reason": str(reason)}
        except Exception as error:
            entry = {"status": "failed", "reason": str(error)}
        entry["seconds"] = round(time.monotonic() - began, 1)
        report["parts"][name] = entry
        (OUT / "gpu_check.json").write_text(json.dumps(report, indent=2))
        said = entry.get("said", "")
        detail = entry.get("reason") or (said if isinstance(said, str) else "\n" + "\n".join(said))
        print(f"{name:16} {entry['status']:8} {entry['seconds']:7.1f} s  {detail}", flush=True)
    print(f"\n{OUT / 'gpu_check.json'}: {time.monotonic() - STARTED:.0f} of {BUDGET:.0f} s")
    return int(any(entry["status"] == "failed" for entry in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

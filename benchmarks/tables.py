"""Write the tables of README.md and docs/ from benchmarks/results/*.json.

    python benchmarks/tables.py            # rewrite the tables in place
    python benchmarks/tables.py --check    # fail if a table is not what the JSON says

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; no number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCUMENTS = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

#: What the tables call each method.
TITLES = {
    "inlay-s2ft": "**inlay S2FT** (o_proj + down_proj, 3%)",
    "inlay-s2ft-in-place": "inlay S2FT, in place",
    "inlay-s2ft-int8": 'inlay S2FT, `compute="int8"`',
    "inlay-lora": "inlay LoRA (r=16, all linears)",
    "inlay-lora-int8": 'inlay LoRA, `compute="int8"`',
    "torch-paca": "PaCA in plain torch (3% of the same inputs)",
    "inlay-qlora": "inlay LoRA on nf4 (r=16, all linears)",
    "inlay-s2ft-nf4": "inlay S2FT on nf4 (3%)",
    "peft-lora": "PEFT LoRA (r=16, all linears)",
    "peft-qlora": "PEFT + bitsandbytes NF4 (r=16, all linears)",
    "full": "full fine-tuning (torch AdamW)",
    "inlay-full": "inlay Full",
    "inlay-freeze-layers": "inlay FreezeLayers (last quarter)",
    "inlay-hft": "inlay HFT",
    "inlay-lisa": "inlay LISA (2 of 30 blocks)",
    "inlay-lisa-blocks": "inlay LISA (2 of 30 blocks, embeddings frozen)",
    "inlay-green": "inlay GreenTrainer (rho=0.5)",
    "inlay-ln-tuning": "inlay LNTuning",
    "inlay-ssf": "inlay SSF",
    "inlay-ia3": "inlay IA3",
}


QUALITY_TITLES = {
    "s2ft": "inlay S2FT (o_proj + down_proj, 3%)",
    "s2ft-down": "inlay S2FT (down_proj, 10%)",
    "peft-lora": "PEFT LoRA (r=16, all linears)",
    "full": "full fine-tuning",
}


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def machine_line(machine: dict[str, Any]) -> str:
    sys.path.insert(0, str(HERE))
    from _measure import describe

    return describe(machine)


def step_table(name: str, peer: str) -> str:
    """One training step per method; ratios are to ``peer``."""
    result = read(name)
    if result is None:
        return "not measured yet\n"
    rows = {row["method"]: row for row in result["rows"]}
    other = rows[peer]
    lines = [
        "| SmolLM2-135M, 4 x 256 tokens, bf16 | tokens/s | peak memory above the model "
        "| kept for backward, per token and layer |",
        "|---|---|---|---|",
    ]
    for method, row in rows.items():
        speed = row["tokens_per_second"] / other["tokens_per_second"]
        memory = row["peak_bytes_above_model"] / other["peak_bytes_above_model"]
        lines.append(
            f"| {TITLES.get(method, method)} | {row['tokens_per_second']:.0f} ({speed:.2f}x) | "
            f"{row['peak_bytes_above_model'] / 2**20:,.0f} MiB ({memory:.2f}x) | "
            f"{row['kept_per_token_per_layer'] / 1000:.1f} KB |"
        )
    floor = sum(result["floor"].values())
    tokens = result.get("floor_tokens", int(result["setting"]["batch"]) * int(result["setting"]["seq"]))
    lines.append("")
    if floor:
        lines.append(
            f"The matrix products and attention of a step alone take {floor:.2f} s ({tokens / floor:.0f} tokens/s)."
        )
    lines.append(f"{machine_line(result['machine'])}.")
    return "\n".join(lines) + "\n"


#: Shapes of a step: the file's ending, and what the tables call it.
SHAPES = {"4x256": "4 x 256", "demo": "32 samples of 6 to 30 tokens", "2048": "1 x 2,048"}


def shapes_table(prefix: str, peer: str) -> str:
    """Tokens/s of every method at several shapes of a batch; ratios are to ``peer`` at each."""
    found = {shape: result for shape in SHAPES if (result := read(f"{prefix}_{shape}")) is not None}
    if not found:
        return "not measured yet\n"
    rows = {shape: {row["method"]: row for row in result["rows"]} for shape, result in found.items()}
    lines = [f"| SmolLM2-135M, bf16, tokens/s | {' | '.join(SHAPES[shape] for shape in found)} |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for method in dict.fromkeys(method for by_method in rows.values() for method in by_method):
        cells = [_speed(by_method, method, peer) for by_method in rows.values()]
        lines.append(f"| {TITLES.get(method, method)} | {' | '.join(cells)} |")
    made: dict[str, list[str]] = {}
    for shape, result in found.items():
        made.setdefault(machine_line(result["machine"]), []).append(SHAPES[shape])
    if len(made) == 1:
        return "\n".join([*lines, "", f"{next(iter(made))}."]) + "\n"
    return "\n".join([*lines, "", *(f"{', '.join(shapes)}: {machine}." for machine, shapes in made.items())]) + "\n"


def _speed(rows: dict[str, Any], method: str, peer: str) -> str:
    if method not in rows:
        return ""
    speed, other = rows[method]["tokens_per_second"], rows[peer]["tokens_per_second"]
    return f"{speed:.0f} ({speed / other:.2f}x)"


def avx2_table() -> str:
    """A step held to AVX2 in fp32, and ours in bf16; ratios are to PEFT LoRA in fp32."""
    results = {"fp32": read("train_step_avx2_float32"), "bf16": read("train_step_avx2_bfloat16")}
    wide = results["fp32"]
    if wide is None:
        return "not measured yet\n"
    peer = next(row for row in wide["rows"] if row["method"] == "peft-lora")
    lines = ["| SmolLM2-135M, 4 x 256 tokens | dtype | tokens/s | peak memory above the model |", "|---|---|---|---|"]
    for dtype, result in results.items():
        for row in (result or {"rows": []})["rows"]:
            speed = row["tokens_per_second"] / peer["tokens_per_second"]
            memory = row["peak_bytes_above_model"] / peer["peak_bytes_above_model"]
            title = TITLES.get(row["method"], row["method"])
            lines.append(
                f"| {title} | {dtype} | {row['tokens_per_second']:.0f} ({speed:.2f}x) | "
                f"{row['peak_bytes_above_model'] / 2**20:,.0f} MiB ({memory:.2f}x) |"
            )
    return "\n".join([*lines, "", f"{machine_line(wide['machine'])}."]) + "\n"


def quality_table() -> str:
    """Error rate at every learning rate; the best by validation loss is bold, and a mean over its seeds."""
    result = read("quality")
    if result is None:
        return "not measured yet\n"
    cells = result["cells"]
    lines = [
        "| equal | method | phoneme error rate by learning rate | forgetting at the best (nats/token) | its steps |",
        "|---|---|---|---|---|",
    ]
    for budget in ("minutes", "steps"):
        for method in dict.fromkeys(cell["method"] for cell in cells):
            group = [c for c in cells if c["method"] == method and c["budget"] == budget]
            if group:
                lines.append(quality_row(group))
    lines += ["", f"Two seeds at the best rate. {machine_line(cells[0]['machine'])}."]
    return "\n".join(lines) + "\n"


def quality_row(group: list[dict[str, Any]]) -> str:
    first = [c for c in group if c["seed"] == 0]
    best = min(first, key=lambda c: c["validation_loss"])
    seeds = [c for c in group if c["learning_rate"] == best["learning_rate"]]

    def mean(key: str) -> float:
        return sum(c[key] for c in seeds) / len(seeds)

    rates = [
        f"**{c['learning_rate']:g}: {mean('error_rate'):.1%}**"
        if c is best
        else f"{c['learning_rate']:g}: {c['error_rate']:.1%}"
        for c in sorted(first, key=lambda c: c["learning_rate"])
    ]
    amount = f"{best['amount']:g} {best['budget'].removesuffix('s')}{'s' * (best['amount'] != 1)}"
    title = QUALITY_TITLES.get(best["method"], best["method"])
    return f"| {amount} | {title} | {', '.join(rates)} | {mean('forgetting'):+.3f} | {mean('steps'):.0f} |"


def scale_table() -> str:
    """GB per GPU, and GB sent per step, by number of GPUs."""
    result = read("scale")
    if result is None:
        return "not estimated yet\n"
    sys.path.insert(0, str(HERE))
    from scale import table

    return table(result["rows"]) + "\n"


def op_table(*ops: str) -> str:
    """Milliseconds of each case of the op benchmarks, and how many times as long each peer takes."""
    lines, machine = ["| case | inlay | peers, times as long |", "|---|---|---|"], None
    for op in ops:
        result = read(f"ops/{op}")
        if result is None:
            continue
        machine = result["machine"]
        before = ""
        for case in result["cases"]:
            name = case["case"].strip() if case["case"][0] != " " else f"{before}, {case['case'].strip()}"
            before = before if case["case"][0] == " " else name
            ours, *peers = case["milliseconds"].items()
            ratios = ", ".join(f"{peer} {time / ours[1]:.2f}x" for peer, time in peers)
            lines.append(f"| {name} | {ours[1]:.2f} ms | {ratios} |")
    if machine is None:
        return "not measured yet\n"
    return "\n".join([*lines, "", f"{machine_line(machine)}."]) + "\n"


def generate_table(name: str, model: str) -> str:
    """Greedy decoding with an adapter active."""
    result = read(name)
    if result is None:
        return "not measured yet\n"
    lines = [f"| {model} on nf4, adapter active | batch | tokens/s |", "|---|---|---|"]
    for row in result["rows"]:
        title = TITLES.get(row["method"], row["method"])
        lines.append(f"| {title} | {row['batch']} | {row['tokens_per_second']:.1f} ({row['ratio']:.2f}x) |")
    return "\n".join([*lines, "", f"{machine_line(result['machine'])}."]) + "\n"


def estimate_table() -> str:
    """Estimated beside measured peak memory."""
    result = read("estimate_cpu")
    if result is None:
        return "not measured yet\n"
    lines = [
        "| SmolLM2-135M, 4 x 256 tokens, bf16 | estimated | low to high | measured | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours, peak = row["estimated"], row["measured"]["peak"]
        low, high = (f"{ours[key] / 2**20:,.0f}" for key in ("low", "high"))
        lines.append(
            f"| {TITLES[row['method']]} | {ours['peak'] / 2**20:,.0f} MiB | {low} to {high} | "
            f"{peak / 2**20:,.0f} MiB | {ours['peak'] / peak:.2f} |"
        )
    return "\n".join([*lines, "", f"{machine_line(result['machine'])}."]) + "\n"


#: Files of results on a GPU, dense and on nf4, and what the tables call the model's shape and the batch.
GPU_STEPS = {
    "llama-1b_4x2048": "Llama-3.2-1B, 4 x 2,048 tokens",
    "llama-8b_1x8192": "Llama-3-8B, 1 x 8,192 tokens",
}


def gpu_steps_table() -> str:
    """Tokens/s and peak memory of a step; ratios are to PEFT's way on the same base."""
    lines = [f"| tokens/s; memory above the model | {' | '.join(GPU_STEPS.values())} |", "|---" * 3 + "|"]
    machine = None
    for kind, peer in (("bf16", "peft-lora"), ("nf4", "peft-qlora")):
        found = [read(f"h200/train_step_{shape}_{kind}") for shape in GPU_STEPS]
        results = [result for result in found if result is not None]
        if len(results) < len(GPU_STEPS):
            return "not measured yet\n"
        machine = results[0]["machine"]
        for method in (row["method"] for row in results[0]["rows"]):
            cells = " | ".join(_gpu_step(result, method, peer) for result in results)
            lines.append(f"| {TITLES.get(method, method)} | {cells} |")
    return "\n".join([*lines, "", f"Weights are random. {machine_line(machine or {})}."]) + "\n"


def _gpu_step(result: dict[str, Any], method: str, peer: str) -> str:
    rows = {row["method"]: row for row in result["rows"]}
    ours, other = rows[method], rows[peer]
    speed = ours["tokens_per_second"] / other["tokens_per_second"]
    memory = ours["peak_bytes_above_model"] / other["peak_bytes_above_model"]
    return (
        f"{ours['tokens_per_second']:,.0f} ({speed:.2f}x); "
        f"{ours['peak_bytes_above_model'] / 2**30:.1f} GiB ({memory:.2f}x)"
    )


def gpu_ops_table() -> str:
    """Microseconds of each kernel, its share of a copy's bandwidth, and how many times as long others take."""
    result = read("h200/ops")
    if result is None:
        return "not measured yet\n"
    lines = ["| case | µs | of a copy's bandwidth | others, times as long |", "|---|---|---|---|"]
    known = {"case", "us", "gigabytes", "gigaflops", "of_copy_bandwidth", "called"}
    for row in result["rows"]:
        share = f"{row['of_copy_bandwidth']:.0%}" if row.get("of_copy_bandwidth") else ""
        ratios = [f"{name} {time / row['us']:.2f}x" for name, time in row.items() if name not in known]
        called = row.get("called") or {}
        ratios += [f"{name}, called, {time / called['ours']:.2f}x" for name, time in called.items() if name != "ours"]
        lines.append(f"| {row['case']} | {row['us']:.1f} | {share} | {', '.join(ratios)} |")
    copy = f"A copy moves {result['copy_gb_per_s']:,.0f} GB/s."
    return "\n".join([*lines, "", f"{copy} {machine_line(result['machine'])}."]) + "\n"


RUN_SHAPES = {
    "short": "32 words of 10 to 33 tokens, of like length, bf16",
    "fp32": "8 samples of 40 to 103 tokens, fp32",
    "tail": "4 samples of 16 to 511 tokens, bf16",
    "packed": "4 packed rows of 256 tokens, bf16",
    "long": "1 sample of 512 to 1,024 tokens, bf16",
}


def run_memory_table() -> str:
    """Estimated beside measured peak memory of whole runs, evaluations included."""
    result = read("run_memory_cpu")
    if result is None:
        return "not measured yet\n"
    lines = ["| a batch (S2FT on SmolLM2-135M) | estimated | measured | ratio |", "|---|---|---|---|"]
    for row in result["rows"]:
        expected, measured = row["expected"], row["measured"]
        lines.append(
            f"| {RUN_SHAPES[row['shape']]} | {expected / 2**20:,.0f} MiB | {measured / 2**20:,.0f} MiB | "
            f"{expected / measured:.2f} |"
        )
    return "\n".join([*lines, "", f"{machine_line(result['machine'])}."]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "train-step": lambda: step_table("train_step_cpu", "peft-lora"),
    "train-step-nf4": lambda: step_table("train_step_cpu_nf4", "peft-qlora"),
    "train-step-shapes": lambda: shapes_table("train_step_avx512_bf16", "peft-lora"),
    "train-step-shapes-nf4": lambda: shapes_table("train_step_avx512_bf16_nf4", "peft-qlora"),
    "train-step-avx2": avx2_table,
    "train-step-whole": lambda: step_table("train_step_cpu_whole", "full"),
    "quality": quality_table,
    "scale": scale_table,
    "estimate": estimate_table,
    "run-memory": run_memory_table,
    "attention": lambda: op_table("attention", "attention_avx512"),
    "gated-delta-rule": lambda: op_table("gated_delta_rule", "causal_conv1d"),
    "four-bit-ops": lambda: op_table("quantize_blockwise", "quantized_linear"),
    "matmul-sum": lambda: op_table("matmul_sum"),
    "cross-entropy": lambda: op_table("cross_entropy"),
    "generate": lambda: generate_table("generate_cpu", "SmolLM2-135M"),
    "gpu-generate": lambda: generate_table("h200/generate_llama-8b", "Llama-3-8B's shape"),
    "gpu-steps": gpu_steps_table,
    "gpu-ops": gpu_ops_table,
}


def rewrite(text: str) -> str:
    return _BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path in DOCUMENTS if path.is_file() and rewrite(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.name}: tables {'are not what benchmarks/results say' if check else 'rewritten'}")
        if not check:
            path.write_text(rewrite(path.read_text()))
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

"""Decode on a GPU beside what reading the weights, keys and values once takes, as a table and a plot.

usage: gpu_table.py NOW.md [--before BEFORE.md] [--vllm VLLM.jsonl] [--read 2.95] [--plot OUT.svg]

NOW.md and BEFORE.md are what `rheostat-loadtest gpu` printed; VLLM.jsonl has the lines that vLLM's benchmark printed, with
"model", "B" and "ms_step"; --read is what the card reads a second, in TB, measured in the same run. --plot needs
matplotlib.
"""
import argparse
import json
import re

# Layers, hidden size, FFN channels, query and KV channels, vocabulary.
SHAPES = {
    "135m": (30, 576, 1536, 576, 192, 49152),
    "1b": (16, 2048, 8192, 2048, 512, 128256),
    "8b": (32, 4096, 14336, 4096, 1024, 128256),
}


def floor(shape, batch, context, read):
    """Milliseconds that reading everything once takes."""
    layers, hidden, ffn, queries, kv, vocab = SHAPES[shape]
    weights = layers * (hidden * (2 * queries + 2 * kv) + 3 * hidden * ffn) + vocab * hidden
    return 2 * (weights + batch * context * layers * 2 * kv) / (read * 1e9)


def measured(path):
    """`(shape, batch)` -> milliseconds a step, and the context."""
    found = {}
    for line in open(path, encoding="utf-8"):
        match = re.match(r"\| (\w+) \| decode of (\d+), context (\d+) \| ([\d.]+) ms", line)
        if match:
            found[match[1], int(match[2])] = (float(match[4]), int(match[3]))
    return found


def plot(rows, path):
    """A bar a measurement, in multiples of the floor."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    sides = [("before", "first run on a GPU", "#d8d8d8"), ("vllm", "vLLM 0.24.0", "#b0703c"), ("now", "Rheostat", "#1f6f8b")]
    for side, (key, label, colour) in enumerate(sides):
        own = [(i, row[key] / row["floor"]) for i, row in enumerate(rows) if row[key]]
        axes.barh([i + 0.28 * (side - 1) for i, _ in own], [v for _, v in own], 0.27, label=label, color=colour)
    axes.set_yticks(range(len(rows)), [f"{row['shape']}, {row['batch']} rows" for row in rows])
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a decode step ÷ reading weights, keys and values once (bf16, context 1,024, H100)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("now")
    parser.add_argument("--before")
    parser.add_argument("--vllm")
    parser.add_argument("--read", type=float, default=2.95)
    parser.add_argument("--plot")
    options = parser.parse_args()
    now, before = measured(options.now), measured(options.before) if options.before else {}
    lines = [json.loads(line) for line in open(options.vllm, encoding="utf-8")] if options.vllm else []
    vllm = {(line["model"], line["B"]): line["ms_step"] for line in lines if "B" in line}
    rows = []
    print("| shape | rows | floor | first run | vLLM | now | now ÷ floor | now ÷ vLLM |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for (shape, batch), (ms, context) in now.items():
        least = floor(shape, batch, context, options.read)
        row = dict(shape=shape, batch=batch, floor=least, now=ms, before=before.get((shape, batch), (None,))[0])
        row["vllm"] = vllm.get((shape, batch))
        rows.append(row)
        show = lambda value: "" if value is None else f"{value:.3f}"
        share = show(ms / row["vllm"]) if row["vllm"] else ""
        print(f"| {shape} | {batch} | {least:.3f} | {show(row['before'])} | {show(row['vllm'])} | {ms:.3f} | {ms / least:.2f} | {share} |")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()

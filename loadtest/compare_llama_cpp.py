"""Our engine beside llama.cpp on this CPU, in turn, as ratios.

usage: compare_llama_cpp.py MODEL.gguf [--threads 2] [--rounds 3] [--json OUT.json] [--plot OUT.svg]

Build llama.cpp's side once (about 8 minutes on 2 cores), into the environment that runs this script:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF" \
        pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    cargo build --release -p rheostat-loadtest

A round runs ours, then theirs, each in a fresh process. The ratio of a line is ours / theirs within one
round; printed are the median ratio and its range over the rounds, and each side's median tokens/s.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target"))


def lines(command):
    """`what` -> best tokens/s of the JSON lines that a command prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    parsed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["what"]: line["best"] for line in parsed}


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def plot(rounds, path):
    """Tokens per second of both, a bar a measurement, with the range over the rounds (needs matplotlib)."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(rounds[0]["llama.cpp"])
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for side, (who, colour) in enumerate([("ours", "#1f6f8b"), ("llama.cpp", "#b0b0b0")]):
        values = [[r[who][name] for r in rounds] for name in names]
        middle = [statistics.median(v) for v in values]
        spread_ = [[m - min(v) for m, v in zip(middle, values)], [max(v) - m for m, v in zip(middle, values)]]
        places = [i + 0.4 * side - 0.2 for i in range(len(names))]
        label = "Rheostat" if who == "ours" else who
        axes.barh(places, middle, 0.38, xerr=spread_, label=label, color=colour, ecolor="#444444")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second (2 cores, SmolLM2-135M Q4_1)")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()

    ours = [str(TARGET / "release" / "rheostat-loadtest"), "engine", "--model", args.model, "--threads", str(args.threads)]
    theirs = [sys.executable, str(HERE / "llama_cpp_bench.py"), args.model, str(args.threads)]
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        rounds.append({"ours": lines(ours), "llama.cpp": lines(theirs)})

    print("| what | ours, tokens/s | llama.cpp, tokens/s | ours ÷ llama.cpp: median (range) |\n|---|---|---|---|")
    for what in rounds[0]["llama.cpp"]:
        a = [r["ours"][what] for r in rounds]
        b = [r["llama.cpp"][what] for r in rounds]
        ratios = [x / y for x, y in zip(a, b)]
        print(f"| {what} | {statistics.median(a):.0f} | {statistics.median(b):.0f} | {spread(ratios)} |")
    for first in (16, 512):
        gains = [r["ours"][f"decode 8 streams from {first}"] / r["ours"][f"decode 1 streams from {first}"] for r in rounds]
        print(f"| ours: 8 streams ÷ 1 stream, from {first} | | | {spread(gains)} |")
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))
    if args.plot:
        plot(rounds, args.plot)


if __name__ == "__main__":
    main()

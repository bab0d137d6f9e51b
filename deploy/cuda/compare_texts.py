#!/usr/bin/env python3
"""Greedy text of one model on the CPU and on the GPU: equal for 64 tokens, or where they part a near-tie.

Starts the given server twice, with device = cpu and device = cuda, and asks both for 20 prompts. Where texts differ, the
CPU's log-probabilities of the two tokens at the first difference are compared: a gap of more than --tie nats fails. The
CPU rounds activations to int8, so a gap may be its own: with --exact the formula in f64 judges instead (exact.py).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was",
    "The three primary colours are",
    "In the year 1969",
    "A triangle has",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "def fibonacci(n):",
    "The largest planet of the solar system",
    "To make tea, first",
    "My favourite season is",
    "The speed of light is",
    "Shakespeare wrote",
    "An atom consists of",
    "The river Nile flows",
    "One, two, three, four,",
    "Dear Sir or Madam,",
    "The best way to learn a language is",
    "Rust is a programming language that",
]


def complete(address, prompt, tokens):
    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 5}
    body["ignore_eos"] = True
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        choice = json.load(response)["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]


def tokenize(address, prompt):
    body = json.dumps({"model": "smollm2-135m", "prompt": prompt}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["tokens"]


def texts(binary, device, tokens):
    with tempfile.TemporaryFile("w+") as log:
        command = [binary, "serve", "--device", device, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        environment = {**os.environ, "RHEOSTAT_MEMORY_KV": "256MiB"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            line = server.stdout.readline()
            address = re.search(r"http://\S+", line)
            if address is None:
                server.wait(10)
                log.seek(0)
                sys.exit(f"the server with device = {device} did not start:\n{log.read()}")
            # Two times: the second goes through steps that were captured.
            complete(address.group(), PROMPTS[0], 8)
            ask = lambda prompt: (*complete(address.group(), prompt, tokens), tokenize(address.group(), prompt))
            return [ask(prompt) for prompt in PROMPTS]
        finally:
            server.terminate()
            server.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tie", type=float, default=0.1, help="nats between two tokens that count as a tie")
    parser.add_argument("--devices", default="cpu,cuda")
    parser.add_argument("--exact", metavar="MODEL.gguf", help="judge by this file's weights; needs numpy and gguf")
    parser.add_argument("--out")
    options = parser.parse_args()
    ours, theirs = (texts(options.binary, device, options.tokens) for device in options.devices.split(","))
    report, failed = [], 0
    for prompt, (a, tops, ids), (b, _, _) in zip(PROMPTS, ours, theirs):
        parted = next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), None)
        entry = {"prompt": prompt, "equal_tokens": len(a) if parted is None else parted}
        if parted is not None:
            top = tops[parted]
            gap = abs(top[a[parted]] - top[b[parted]]) if b[parted] in top else None
            entry["tokens"], entry["gap_nats"] = [a[parted], b[parted]], gap
            entry["prompt_ids"], entry["before"] = ids, a[:parted]
            failed += gap is None or gap > options.tie
        report.append(entry)
        print(json.dumps({key: value for key, value in entry.items() if key not in ("prompt_ids", "before")}))
    whole = sum(entry["equal_tokens"] == options.tokens for entry in report)
    print(f"{whole} of {len(report)} texts are equal for {options.tokens} tokens; {failed} part at more than a tie")
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    if options.exact:
        import exact

        failed = exact.judge(options.exact, report, options.tie)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How many sequences of 2,048 tokens a running server holds at once in one memory.kv, with ThinK and without.

    python3 loadtest/think_capacity.py --binary target/release/rheostat

Starts the server with a KV budget for --dense sequences (to the page) and sends batches of N requests at once:
2,000 prompt tokens and 48 of output each, all different. A batch fits if all its sequences were seen running
together and none was preempted, as /metrics tells. Printed are the largest batches that fit, their ratio, and what
the byte formula predicts of it. Steps are long (4,096 tokens), so that all prompts are in before the first
output ends. Not a measurement of time: other work on the machine only makes it slower.
"""

import argparse
import json
import re
import subprocess
import threading
import time
import urllib.request

PROMPT, OUTPUT, BLOCK = 2000, 48, 16
# SmolLM2-135M: 30 layers, 3 KV heads of 64 channels, keys and values of 2 bytes.
LAYERS, PAGE = 30, 2 * 3 * 64 * 2 * BLOCK
SEQUENCE = (PROMPT + OUTPUT) // BLOCK * LAYERS * PAGE


def kept(ratio):
    """Channels that are kept of 64: rounded up to a multiple of 8."""
    return -(-round(64 * (1 - ratio), 6) // 8) * 8


def predicted(ratio, recent):
    """Bytes of a dense sequence over those with the prompt's keys pruned but for the recent ones."""
    pruned = (PROMPT - recent) // BLOCK * BLOCK
    per_slot = LAYERS * 3 * 64 * 2
    return SEQUENCE / (SEQUENCE - pruned * per_slot * (1 - kept(ratio) / 64))


class Server:
    def __init__(self, binary, kv, log):
        command = [binary, "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--memory-kv", str(kv),
                   "--prefix-caching", "false", "--max-num-batched-tokens", "4096"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+", line).group(0)

    def metrics(self):
        with urllib.request.urlopen(self.url + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def complete(self, index, compression, results):
        prompt = [100 + (index * 7919 + i * 104729) % 48000 for i in range(PROMPT)]
        body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        if compression:
            body["compression"] = compression
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=1800) as answer:
            results.append(json.load(answer)["usage"])

    def batch(self, count, compression):
        """Runs a batch; (most sequences seen running at once, preemptions, KV bytes of a sequence)."""
        before = self.metrics()["rheostat_preemptions_total"]
        results = []
        threads = [threading.Thread(target=self.complete, args=(i, compression, results)) for i in range(count)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, int(self.metrics()["rheostat_sequences_running"]))
            time.sleep(0.2)
        assert len(results) == count, f"{count - len(results)} requests failed"
        tokens = {(usage["prompt_tokens"], usage["completion_tokens"]) for usage in results}
        assert tokens == {(PROMPT, OUTPUT)}, tokens
        preempted = int(self.metrics()["rheostat_preemptions_total"] - before)
        return most, preempted, results[0]["compression"]["kv_bytes"]


def largest(server, guess, compression, name):
    """The largest batch that fits, looked for from a guess."""
    fits = {}

    def try_batch(count):
        if count not in fits:
            most, preempted, kv = server.batch(count, compression)
            fits[count] = most == count and preempted == 0
            print(f"{name}: {count} requests: {most} at once, {preempted} preemptions, "
                  f"{kv / 2**20:.1f} MiB of KV each", flush=True)
        return fits[count]

    count = guess
    while not try_batch(count):
        count -= 1
    while try_batch(count + 1):
        count += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/rheostat")
    parser.add_argument("--dense", type=int, default=20, help="dense sequences that the budget holds")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--recent", type=int, default=32)
    options = parser.parse_args()
    with open("/dev/null", "w") as log:
        server = Server(options.binary, options.dense * SEQUENCE, log)
    try:
        dense = largest(server, options.dense, None, "dense")
        ratio = predicted(options.ratio, options.recent)
        plan = {"think": {"ratio": options.ratio, "recent": options.recent}}
        think = largest(server, int(options.dense * ratio), plan, "think")
    finally:
        server.process.terminate()
        server.process.wait()
    print(f"dense {dense}, ThinK {think}: {think / dense:.3f} times as many; the byte formula predicts {ratio:.3f}")


if __name__ == "__main__":
    main()

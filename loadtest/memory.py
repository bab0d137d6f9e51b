"""Start-up time and resident memory of the real server on Linux.

usage: memory.py [--binary target/release/rheostat] [--model smollm2-135m] [--streams 8] [--tokens 1024]

Starts the server (the model must be on disk: run `rheostat pull` first), waits for /ready, runs --streams
concurrent streamed completions that fill --tokens of context each, and reads the server's own pages from
/proc/PID/status: at ready, the highest while streaming, and after.
"""
import argparse
import http.client
import json
import pathlib
import re
import subprocess
import threading
import time

MIB = 1 << 20


def resident(pid):
    """(VmRSS, VmHWM) in bytes."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{key}:\s+(\d+) kB", text).group(1)) * 1024 for key in ("VmRSS", "VmHWM"))


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def wait_ready(process, port, started):
    while True:
        try:
            if get(port, "/ready")[0] == 200:
                return time.perf_counter() - started
        except OSError:
            pass
        assert process.poll() is None, "the server ended before it was ready"
        time.sleep(0.005)


def stream(port, prompt, max_tokens, counts):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage")
            if usage:
                counts.append(usage["total_tokens"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/rheostat")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()

    started = time.perf_counter()
    process = subprocess.Popen([args.binary, "serve", "--model", args.model, "--http", f"127.0.0.1:{args.port}",
                                "--grpc", "127.0.0.1:0"])
    try:
        ready_s = wait_ready(process, args.port, started)
        at_ready = resident(process.pid)
        prompt_tokens = args.tokens // 2
        counts, threads = [], []
        for i in range(args.streams):
            prompt = [100 + (i * 7919 + j * 104729) % 40000 for j in range(prompt_tokens)]
            threads.append(threading.Thread(target=stream, args=(args.port, prompt, args.tokens - prompt_tokens, counts)))
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        highest = 0
        while any(thread.is_alive() for thread in threads):
            highest = max(highest, resident(process.pid)[0])
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        after = resident(process.pid)
        assert len(counts) == args.streams and all(c == args.tokens for c in counts), counts
        print(json.dumps({
            "ready_s": round(ready_s, 3), "rss_ready_mib": round(at_ready[0] / MIB, 1),
            "rss_highest_mib": round(highest / MIB, 1), "rss_after_mib": round(after[0] / MIB, 1),
            "peak_mib": round(after[1] / MIB, 1), "streams": args.streams, "tokens_each": args.tokens,
            "seconds": round(seconds, 2)}))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()

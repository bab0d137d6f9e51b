"""How fast the running server follows memory.weights, and what its streams notice of it.

usage: budgets.py MODEL.bitstack [--binary target/release/rheostat] [--change 50] [--streams 4] [--rounds 6]

Starts the server with the whole artefact less --change MiB, keeps --streams greedy streams running, and in every
round takes --change MiB more and gives them back. Reports the server's own `reached_after_seconds` of each change, and
the time between tokens: while nothing changes, and from each change until it was reached and the streams had their
next tokens. --tokens is what each request generates before the next one begins.
"""
import argparse
import http.client
import json
import statistics
import subprocess
import threading
import time

from memory import MIB, get, resident, wait_ready


def put(port, weights):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"weights": weights, "timeout_seconds": 60})
    connection.request("PUT", "/admin/memory", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200 and answer["reached"], answer
    return answer["weights"]


def stream(port, number, args, state):
    """Requests one after the other; (time, seconds since the token before) of every token but the first ones."""
    index = 0
    while not state["stop"]:
        index += 1
        prompt = [100 + (number * 7919 + index * 31337 + j * 104729) % 40000 for j in range(args.prompt)]
        body = {"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        before = None
        for line in response:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if before is not None:
                    state["gaps"].append((now, now - before))
                before = now


def p99(values):
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--binary", default="target/release/rheostat")
    parser.add_argument("--port", type=int, default=18081)
    parser.add_argument("--change", type=float, default=50.0, help="MiB")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steady", type=float, default=4.0, help="seconds between changes")
    parser.add_argument("--flags", default="", help="further flags of `rheostat serve`")
    args = parser.parse_args()
    process = subprocess.Popen([args.binary, "serve", "--model", args.model, "--http", f"127.0.0.1:{args.port}",
                                "--grpc", "127.0.0.1:0", *args.flags.split()])
    try:
        wait_ready(process, args.port, time.perf_counter())
        weights = json.loads(get(args.port, "/admin/memory")[1])["weights"]
        large = weights["whole"]
        small = large - int(args.change * MIB)
        assert small >= weights["base"], "the artefact has less than that over its base"
        put(args.port, small)
        state = {"stop": False, "gaps": []}
        threads = [threading.Thread(target=stream, args=(args.port, i, args, state)) for i in range(args.streams)]
        for thread in threads:
            thread.start()
        time.sleep(args.steady)
        changes, seconds, held = [], {"up": [], "down": []}, []
        begin = time.perf_counter()
        for _ in range(args.rounds):
            for direction, budget in (("up", large), ("down", small)):
                start = time.perf_counter()
                answer = put(args.port, budget)
                changes.append((direction, start, time.perf_counter()))
                seconds[direction].append(answer["reached_after_seconds"])
                held.append((budget - answer["held"]) / MIB)
                time.sleep(args.steady)
        state["stop"] = True
        for thread in threads:
            thread.join()
        gaps = [gap for gap in state["gaps"] if gap[0] >= begin]
        # A gap belongs to a change when any of it lies within.
        within = {direction: [gap for at, gap in gaps for d, start, end in changes
                              if d == direction and at > start and at - gap < end] for direction in seconds}
        steady = [gap for at, gap in gaps if not any(at > start and at - gap < end for _, start, end in changes)]
        report = {"steady_ms": {"p50": statistics.median(steady) * 1e3, "p99": p99(steady) * 1e3},
                  "asked_less_held_mib": [min(held), max(held)], "rss_mib": resident(process.pid)[0] / MIB}
        for direction, times in seconds.items():
            report[direction] = {"seconds": [min(times), statistics.median(times), max(times)],
                                 "p99_ms": p99(within[direction]) * 1e3,
                                 "p99_over_steady": p99(within[direction]) / p99(steady)}
        print(json.dumps(report, indent=1))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()

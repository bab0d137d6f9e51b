"""What a flood of outputs that do not end costs the others: p99 of honest chats without it and with it.

Usage: flood.py --binary target/release/rheostat [--seconds 60] [--mode act]

Starts the server with two API keys. Honest clients ask short questions, one after the other. The flood keeps eight
requests open whose end is out of sight: their end-of-sequence tokens are biased away, and they are sampled hot. The
rounds are: quiet, flood, quiet, flood; both floods meet one server, which has learned from the quiet round before.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is two plus two?", "Say hello.",
             "Name an animal.", "What do bees make?", "Is water wet?", "Name a river."]
EOS = {"0": -100, "2": -100}


def start(binary, mode):
    """The server, its address, and its two keys."""
    config = ""
    keys = {}
    for name in ("alice", "mallory"):
        said = subprocess.run([binary, "key", name], check=True, capture_output=True, text=True).stdout
        keys[name] = said.splitlines()[1].removeprefix("# ")
        config += said
    path = pathlib.Path(tempfile.mkdtemp()) / "rheostat.toml"
    path.write_text(config)
    command = [binary, "serve", "--config", str(path), "--http", "127.0.0.1:8193", "--grpc", "127.0.0.1:50193",
               "--verbosity", mode, "--verbosity-min-tokens", "96", "--verbosity-grace-tokens", "16", "--log", "error"]
    server = subprocess.Popen(command)
    url = "http://127.0.0.1:8193"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=1)
            return server, url, keys
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def chat(url, key, **fields):
    """The answer and how long it took."""
    body = json.dumps({"model": "smollm2-135m", **fields}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    begin = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=600) as r:
        return json.load(r), time.monotonic() - begin


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, url, keys):
        self.url, self.keys = url, keys
        self.stop = threading.Event()
        self.honest, self.flood = [], []

    def ask(self, number):
        while not self.stop.is_set():
            number += 1
            question = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
            answer, took = chat(self.url, self.keys["alice"], messages=question, max_tokens=96, seed=number)
            self.honest.append((took, answer["choices"][0]["finish_reason"]))

    def verbose(self, number):
        while not self.stop.is_set():
            number += 8
            story = [{"role": "user", "content": "Tell me everything."}]
            answer, _ = chat(self.url, self.keys["mallory"], messages=story, max_tokens=1500, temperature=1.5,
                             logit_bias=EOS, seed=number, deadline=max(self.end - time.monotonic(), 0.1))
            choice = answer["choices"][0]
            reason = choice["stop_reason"] or choice["finish_reason"]
            self.flood.append((answer["usage"]["completion_tokens"], reason))

    def run(self, seconds, flood):
        # What is left of the flood ends with the round, by its own deadline.
        self.end = time.monotonic() + seconds
        clients = [threading.Thread(target=self.ask, args=(1000 * i,), daemon=True) for i in range(2)]
        clients += [threading.Thread(target=self.verbose, args=(i,), daemon=True) for i in range(8 if flood else 0)]
        for client in clients:
            client.start()
        time.sleep(seconds)
        self.stop.set()
        for client in clients:
            client.join()
        return self


def p99(load):
    times = sorted(took for took, _ in load.honest)
    return times[min(len(times) - 1, len(times) * 99 // 100)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mode", default="act", choices=("off", "report", "act"))
    arguments = parser.parse_args()
    server, url, keys = start(arguments.binary, arguments.mode)
    try:
        for _ in range(2):
            quiet = Load(url, keys).run(arguments.seconds, flood=False)
            flooded = Load(url, keys).run(arguments.seconds, flood=True)
            reasons = sorted({reason for _, reason in flooded.flood})
            stopped = sum(reason == "stop" for _, reason in quiet.honest)
            longest = max((tokens for tokens, why in flooded.flood if why != "deadline"), default=0)
            print(f"{arguments.mode}: honest p99 {p99(quiet):.2f} s quiet ({len(quiet.honest)}, {stopped} ended by "
                  f"themselves), {p99(flooded):.2f} s flooded ({len(flooded.honest)}): {p99(flooded) / p99(quiet):.2f}x; "
                  f"{len(flooded.flood)} of the flood ended, longest {longest} tokens, by {', '.join(reasons)}", flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

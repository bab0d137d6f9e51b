"""llama.cpp's side of the comparison: prefill and batched decode on this CPU, as JSON lines.

usage: llama_cpp_bench.py MODEL.gguf [threads]
needs llama-cpp-python built with native flags (see compare_llama_cpp.py). Batched decode goes through
llama_decode with one token of each sequence a step, as llama.cpp's own server does.
"""
import json
import statistics
import sys
import time

import llama_cpp as llama

DECODE_STEPS = 48
ROUNDS = 3

path, threads = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2
quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, None)
llama.llama_backend_init()
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(2048, 0, 1)


def context(n_seq, n_ctx):
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx * n_seq, 2048, 512, n_seq
    params.n_threads = params.n_threads_batch = threads
    return llama.llama_init_from_model(model, params)


def token(i):
    return 100 + (i * 7919) % (n_vocab - 200)


def run(ctx, rows):
    """One llama_decode over rows of (token, position, sequence, wants logits)."""
    batch.n_tokens = len(rows)
    for i, (tok, pos, seq, logits) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = tok, pos, 1
        batch.seq_id[i][0], batch.logits[i] = seq, logits
    assert llama.llama_decode(ctx, batch) == 0


def prefill(ctx, n, seq=0):
    start = time.perf_counter()
    for s in range(0, n, 512):
        m = min(512, n - s)
        run(ctx, [(token(s + i), s + i, seq, int(s + i == n - 1)) for i in range(m)])
    llama.llama_synchronize(ctx)
    return n / (time.perf_counter() - start)


def decode(ctx, n_seq, first):
    start = time.perf_counter()
    for k in range(DECODE_STEPS):
        run(ctx, [(token(k + s), first + k, s, 1) for s in range(n_seq)])
        for s in range(n_seq):
            llama.llama_get_logits_ith(ctx, s)[0]
    llama.llama_synchronize(ctx)
    return n_seq * DECODE_STEPS / (time.perf_counter() - start)


def report(what, rates):
    line = {"what": what, "best": round(max(rates), 1), "median": round(statistics.median(rates), 1)}
    print(json.dumps(line), flush=True)


def prefill_rate(n):
    ctx = context(1, 2048)
    prefill(ctx, 16)
    llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
    rate = prefill(ctx, n)
    llama.llama_free(ctx)
    return rate


def decode_rate(n_seq, first):
    ctx = context(n_seq, 1024)
    for seq in range(n_seq):
        prefill(ctx, first, seq)
    rate = decode(ctx, n_seq, first)
    llama.llama_free(ctx)
    return rate


for n in (16, 512, 1024):
    report(f"prefill {n}", [prefill_rate(n) for _ in range(ROUNDS)])
for n_seq in (1, 2, 4, 8, 16):
    for first in (16, 512):
        report(f"decode {n_seq} streams from {first}", [decode_rate(n_seq, first) for _ in range(ROUNDS)])

"""Checks images and the dropping of their tokens over rheostat.v1 with grpcio.

Usage: vision_grpc_client.py ADDRESS --picture FILE --tokens N

An image takes N tokens of the prompt.
"""

import argparse
import sys
from pathlib import Path

import grpc

from checks import check, equal, finish, raises, run_all
from grpc_client import compression, gen, greedy, prompt_pb2, request


class Server:
    """The generation service, a picture, and the tokens that it takes."""

    def __init__(self, address, picture, tokens):
        from grpc_client import generation_pb2_grpc

        channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(channel).result(timeout=30)
        self.stub = generation_pb2_grpc.GenerationServiceStub(channel)
        self.picture = picture.read_bytes()
        self.tokens = tokens

    def ask(self, vision=None):
        parts = [prompt_pb2.ContentPart(image=self.picture), prompt_pb2.ContentPart(text="What is it?")]
        chat = prompt_pb2.ChatPrompt(messages=[prompt_pb2.ChatMessage(role="user", parts=parts)])
        # Prefixes of their own: what a request runs does not depend on what was asked before.
        fields = {"chat": chat, "max_tokens": 8, "sampling": greedy(), "cache_salt": f"dropping {vision}"}
        return self.stub.Generate(request(compression=compression.Compression(vision=vision), **fields), timeout=120)


def check_dropped_tokens_are_told(server):
    whole = server.ask().usage.compression
    equal((whole.visual_tokens.shown, whole.visual_tokens.kept), (server.tokens,) * 2, "without dropping")
    keep = max(server.tokens // 9, 1)
    kinds = compression.Vision
    for vision in (
        kinds(keep=keep),
        kinds(keep=keep, merge=2, key_rate=0, alpha=0.01, beta=0.5, layers=compression.Layers(index=[0])),
        kinds(keep=keep, baseline=kinds.POOL),
        kinds(keep=keep, baseline=kinds.RANDOM, seed=5),
    ):
        usage = server.ask(vision).usage.compression
        tokens, plan = usage.visual_tokens, usage.plan.vision
        equal((tokens.shown, plan.keep, plan.baseline), (server.tokens, keep, vision.baseline), f"{vision}")
        check(1 <= tokens.kept <= keep and tokens.mean_kept <= server.tokens, f"{tokens}")
        check(usage.attention_layers_run < whole.attention_layers_run, f"{usage}")
        if vision.HasField("layers"):
            equal(list(plan.layers.index), [0], "layers of the plan")
    off = server.ask(kinds(merge=2, layers=compression.Layers())).usage.compression
    equal(off.visual_tokens.kept, server.tokens, "no layers, nothing merged")


def check_bad_options_are_refused(server):
    for vision in (compression.Vision(keep=0), compression.Vision(baseline=7), compression.Vision(alpha=2)):
        with raises(grpc.RpcError, str(vision)) as caught:
            server.ask(vision)
        equal(caught[0].code(), grpc.StatusCode.INVALID_ARGUMENT, f"{vision}: {caught[0].details()}")
        check("compression.vision" in caught[0].details(), caught[0].details())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--picture", required=True, type=Path)
    parser.add_argument("--tokens", required=True, type=int)
    args = parser.parse_args()
    run_all(sys.modules[__name__], Server(args.address, args.picture, args.tokens))
    finish()


if __name__ == "__main__":
    main()

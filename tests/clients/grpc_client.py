"""Checks rheostat.v1, health and reflection with grpcio and stubs made from our protos.

Usage: grpc_client.py ADDRESS [--http-url URL]

With --http-url (http://host:port) cancellation is proved by the server's own gauges, too.
"""

import argparse
import pathlib
import sys
import tempfile
import urllib.request

import grpc
from grpc_tools import protoc

from checks import check, equal, eventually, finish, raises, run_all

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
PROMPT = "The capital of France is"
# Longer than any check waits: only a cancellation ends it in time.
ENDLESS = 1_000_000


def make_stubs():
    """Compiles our protos into a folder of the import path."""
    out = tempfile.mkdtemp()
    files = sorted(str(path.relative_to(PROTO)) for path in (PROTO / "rheostat").rglob("*.proto"))
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    arguments = [f"-I{PROTO}", f"-I{include}", f"--python_out={out}", f"--grpc_python_out={out}", *files]
    if protoc.main(["protoc", *arguments]):
        sys.exit("our protos do not compile")
    sys.path.insert(0, out)


make_stubs()

from google.protobuf import struct_pb2  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection_pb2 as reflection  # noqa: E402
from rheostat.v1 import compression_pb2 as compression  # noqa: E402
from rheostat.v1 import generation_pb2 as gen  # noqa: E402
from rheostat.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, prompt_pb2  # noqa: E402
from rheostat.v1 import tokenization_pb2 as tok  # noqa: E402
from rheostat.v1 import tokenization_pb2_grpc  # noqa: E402


class Server:
    """Stubs of every service on one channel."""

    def __init__(self, address, http_url):
        self.channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(self.channel).result(timeout=30)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.tokenization = tokenization_pb2_grpc.TokenizationServiceStub(self.channel)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.http_url = http_url
        self.context = self.models.GetModelInfo(models_pb2.GetModelInfoRequest()).max_model_len

    def generate(self, **fields):
        return self.generation.Generate(request(**fields), timeout=120)

    def stream(self, **fields):
        return self.generation.GenerateStream(request(**fields), timeout=120)

    def tokens(self, text):
        return list(self.tokenization.Tokenize(tok.TokenizeRequest(text=text)).token_ids)

    def gauge(self, name):
        """The value of one of the server's gauges."""
        page = urllib.request.urlopen(f"{self.http_url}/metrics", timeout=10).read().decode()
        for line in page.splitlines():
            if line.split(" ")[0].split("{")[0] == name:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"/metrics has no {name}")

    def endless(self):
        """Fields of a request that runs until the context is full."""
        room = self.context - len(self.tokens(PROMPT))
        return {"max_tokens": min(ENDLESS, room), "sampling": greedy(ignore_eos=True)}

    def idle(self):
        """Whether nothing runs or waits, as far as can be seen from here."""
        if not self.http_url:
            return True
        return self.gauge("rheostat_sequences_running") + self.gauge("rheostat_sequences_waiting") == 0

    def is_gone(self, request_id):
        """Whether no live request has this id. Aborts it if one does, so ask only when it should not."""
        with raises(grpc.RpcError, f"request {request_id} is still there") as caught:
            self.generation.Abort(gen.AbortRequest(request_id=request_id))
        equal(caught[0].code(), grpc.StatusCode.NOT_FOUND, "abort of a request that is gone")


def greedy(**fields):
    return gen.SamplingParams(temperature=0, **fields)


def request(**fields):
    if not fields.keys() & {"text", "tokens", "chat"}:
        fields["text"] = PROMPT
    fields.setdefault("max_tokens", 12)
    fields.setdefault("sampling", greedy())
    return gen.GenerateRequest(**fields)


def refused(server, code, param=None, **fields):
    """Both calls refuse the request with `code`, and name the field."""
    what = str(fields)[:80]
    for call in (server.generate, lambda **f: list(server.stream(**f))):
        with raises(grpc.RpcError, what) as caught:
            call(**fields)
        error = caught[0]
        equal(error.code(), code, f"{what}: {error.details()}")
        check(error.details(), "an error has a message")
        if param:
            trailers = dict(error.trailing_metadata())
            equal(trailers.get("x-error-param"), param, f"{what}: {error.details()}")


def check_models(server):
    models = server.models.ListModels(models_pb2.ListModelsRequest()).models
    equal(len(models), 1, "models served")
    info = server.models.GetModelInfo(models_pb2.GetModelInfoRequest(model=models[0].name))
    equal(info, models[0], "one model and the list")
    check(info.max_model_len > 0 and info.dims.num_layers > 0 and info.dims.weight_bytes > 0, f"sizes: {info}")
    check("dense" in info.profiles, f"profiles: {info.profiles}")
    check(info.special_tokens.eos, "the model has an end-of-sequence token")
    with raises(grpc.RpcError, "an unknown model") as caught:
        server.models.GetModelInfo(models_pb2.GetModelInfoRequest(model="no-such-model"))
    equal(caught[0].code(), grpc.StatusCode.NOT_FOUND, "an unknown model")


def check_tokenization(server):
    for text in ("Hello, world!", "naïve café — 東京 🚀", " leading and  double spaces\n"):
        asked = tok.TokenizeRequest(text=text, add_special_tokens=False, return_tokens=True)
        answer = server.tokenization.Tokenize(asked)
        equal(len(answer.tokens), len(answer.token_ids), "tokens and ids")
        back = server.tokenization.Detokenize(tok.DetokenizeRequest(token_ids=answer.token_ids))
        equal(back.text.strip(), text.strip(), "text there and back")
    with raises(grpc.RpcError, "a token outside the vocabulary") as caught:
        server.tokenization.Detokenize(tok.DetokenizeRequest(token_ids=[4_000_000_000]))
    equal(caught[0].code(), grpc.StatusCode.INVALID_ARGUMENT, "a token outside the vocabulary")


def check_unary(server):
    answer = server.generate()
    prompt = server.tokens(PROMPT)
    equal(len(answer.choices), 1, "choices")
    choice = answer.choices[0]
    equal(answer.usage.prompt_tokens, len(prompt), "prompt tokens")
    equal(answer.usage.completion_tokens, len(choice.token_ids), "completion tokens")
    check(len(choice.token_ids) <= 12 and choice.text, f"choice: {choice}")
    expected = gen.FINISH_REASON_LENGTH if len(choice.token_ids) == 12 else gen.FINISH_REASON_STOP
    equal(choice.finish_reason, expected, "finish reason")
    check(answer.request_id, "the request has an id")
    check(not choice.logprobs and not answer.HasField("prompt"), "nothing that was not asked for")
    by_tokens = server.generate(tokens=prompt_pb2.TokenIds(ids=prompt))
    equal(by_tokens.choices[0].text, choice.text, "text and token prompts")


def check_stream_equals_unary(server):
    sampling = greedy(logprobs=2)
    whole = server.generate(sampling=sampling)
    events = list(server.stream(sampling=sampling))
    kinds = [event.WhichOneof("event") for event in events]
    equal((kinds[0], kinds[-2], kinds[-1]), ("started", "finished", "completed"), "order of events")
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    choice = whole.choices[0]
    equal("".join(delta.text for delta in deltas), choice.text, "text")
    equal([t for delta in deltas for t in delta.token_ids], list(choice.token_ids), "tokens")
    streamed = [t for delta in deltas for t in delta.logprobs]
    equal([t.token_id for t in streamed], list(choice.token_ids), "tokens of log-probabilities")
    equal(events[-2].finished.finish_reason, choice.finish_reason, "finish reason")
    equal(events[-1].completed.usage.completion_tokens, len(choice.token_ids), "completion tokens")
    equal(events[0].started.prompt_tokens, whole.usage.prompt_tokens, "prompt tokens")
    for scored in choice.logprobs:
        equal(len(scored.top), 2, "alternatives")
        check(scored.logprob <= 0, f"log-probability {scored.logprob}")
        equal(scored.token_id, scored.top[0].token_id, "greedy takes the likeliest")
        check(scored.top[0].logprob >= scored.top[1].logprob, "alternatives descend")


def check_chat(server):
    chat = prompt_pb2.ChatPrompt(
        messages=[
            prompt_pb2.ChatMessage(role="system", content="You are brief."),
            prompt_pb2.ChatMessage(role="user", content="Say hello."),
        ]
    )
    answer = server.generate(chat=chat)
    check(answer.choices[0].token_ids, "a chat is answered")
    encoded = server.tokenization.Tokenize(tok.TokenizeRequest(chat=chat))
    equal(len(encoded.token_ids), answer.usage.prompt_tokens, "tokens of the rendered chat")
    arguments = struct_pb2.Struct()
    arguments["some_flag"] = True
    chat.template_args.CopyFrom(arguments)
    check(server.generate(chat=chat).choices, "template arguments are taken")
    refused(server, grpc.StatusCode.INVALID_ARGUMENT, chat=prompt_pb2.ChatPrompt())


def check_choices_and_seed(server):
    sampling = gen.SamplingParams(temperature=1.5, seed=7)
    first = server.generate(n=3, sampling=sampling)
    equal([choice.index for choice in first.choices], [0, 1, 2], "choices")
    equal(first.usage.completion_tokens, sum(len(c.token_ids) for c in first.choices), "completion tokens")
    check(len({tuple(c.token_ids) for c in first.choices}) > 1, "choices differ")
    again = server.generate(n=3, sampling=sampling)
    equal([c.text for c in again.choices], [c.text for c in first.choices], "the same seed")
    texts = ["", "", ""]
    finished = []
    for event in server.stream(n=3, sampling=sampling):
        if event.WhichOneof("event") == "delta":
            texts[event.delta.index] += event.delta.text
        elif event.WhichOneof("event") == "finished":
            finished.append(event.finished.index)
    equal(texts, [c.text for c in first.choices], "streamed choices")
    equal(sorted(finished), [0, 1, 2], "each choice finishes once")


def check_stop(server):
    whole = server.generate(max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    choice = server.generate(max_tokens=24, sampling=greedy(stop=[stop])).choices[0]
    equal(choice.finish_reason, gen.FINISH_REASON_STOP, "finish reason")
    equal(choice.stop, stop, "the stop that ended it")
    equal(choice.text, whole[: whole.index(stop)], "text before the stop")
    kept = server.generate(max_tokens=24, sampling=greedy(stop=[stop], include_stop=True)).choices[0]
    equal(kept.text, choice.text + stop, "text with the stop")


def check_token_controls(server):
    plain = list(server.generate().choices[0].token_ids)
    banned = list(server.generate(sampling=greedy(logit_bias={plain[0]: -100})).choices[0].token_ids)
    check(plain[0] not in banned, "a banned token does not come")
    forced = server.generate(max_tokens=4, sampling=greedy(logit_bias={plain[0]: 100}))
    equal(list(forced.choices[0].token_ids), [plain[0]] * 4, "a forced token comes")
    stopped = server.generate(sampling=greedy(stop_token_ids=[plain[1]])).choices[0]
    equal(stopped.finish_reason, gen.FINISH_REASON_STOP, "stop token")
    longer = server.generate(sampling=greedy(stop_token_ids=[plain[1]], min_tokens=6)).choices[0]
    check(len(longer.token_ids) >= 6, f"min_tokens: {longer}")
    full = server.generate(max_tokens=40, sampling=greedy(ignore_eos=True)).choices[0]
    equal(len(full.token_ids), 40, "ignore_eos")


def check_prompt_scores(server):
    tokens = server.tokens(PROMPT)
    answer = server.generate(max_tokens=0, echo=True, prompt_logprobs=True, sampling=greedy(logprobs=1))
    equal(list(answer.prompt.token_ids), tokens, "prompt tokens")
    equal([scored.token_id for scored in answer.prompt.logprobs], tokens, "scored tokens")
    check(not answer.prompt.logprobs[0].HasField("logprob"), "nothing precedes the first token")
    check(all(scored.logprob <= 0 for scored in answer.prompt.logprobs[1:]), "log-probabilities")
    check(PROMPT in answer.prompt.text, f"echo: {answer.prompt.text!r}")
    equal(answer.choices[0].text, "", "no completion")
    asked = {"max_tokens": 2, "echo": True, "prompt_logprobs": True, "sampling": greedy(logprobs=1)}
    kinds = [event.WhichOneof("event") for event in server.stream(**asked)]
    equal(kinds[:2], ["started", "prompt"], "the prompt comes before any token")
    only_echo = [event.WhichOneof("event") for event in server.stream(max_tokens=2, echo=True)]
    equal(only_echo.count("prompt"), 1, "the prompt comes once")


def check_bad_requests(server):
    bad = grpc.StatusCode.INVALID_ARGUMENT
    refused(server, bad, "prompt", text=None)
    refused(server, bad, text="")
    refused(server, bad, tokens=prompt_pb2.TokenIds())
    refused(server, bad, tokens=prompt_pb2.TokenIds(ids=[4_000_000_000]))
    refused(server, bad, text="word " * 3 * server.context)
    refused(server, bad, "max_tokens", max_tokens=-1)
    refused(server, bad, "n", n=0)
    refused(server, bad, "n", n=1_000_000)
    for name, value in (
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("logprobs", 1_000_000),
        ("stop", ["x"] * 10_000),
        ("logit_bias", {4_000_000_000: 1.0}),
    ):
        refused(server, bad, name, sampling=gen.SamplingParams(**{name: value}))
    refused(server, grpc.StatusCode.NOT_FOUND, "model", model="no-such-model")
    with raises(grpc.RpcError, "a message over the limit") as caught:
        server.generate(text="x" * (5 << 20))
    check(caught[0].code() in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED), caught[0])
    check(server.generate().choices, "the server goes on")


def check_compression(server):
    plain = server.generate().choices[0].text
    equal(server.generate(compression=compression.Compression(profile="dense")).choices[0].text, plain, "dense")
    bad = grpc.StatusCode.INVALID_ARGUMENT
    refused(server, bad, compression=compression.Compression(profile="no-such-profile"))
    with raises(grpc.RpcError, "a profile in the metadata") as caught:
        server.generation.Generate(request(), metadata=[("x-rheostat-profile", "no-such-profile")])
    equal(caught[0].code(), bad, "a profile in the metadata")
    refused(server, bad, "compression.think.ratio", compression=compression.Compression(think=compression.Think(ratio=1.4)))
    eco = server.generate(compression=compression.Compression(profile="eco"), max_tokens=8).usage.compression
    check(eco.attention_layers_run < eco.dense_layers, "the shipped calibration's eco drops attention")
    text = "A line of a long prompt. " * 120
    pruned = compression.Compression(think=compression.Think(ratio=0.4))
    both = [server.generate(text=text, max_tokens=8, compression=c).usage.compression for c in (None, pruned)]
    check(both[1].kv_bytes < 0.9 * both[0].kv_bytes, f"pruned keys take fewer pages: {both}")
    shallow = compression.Compression(skip_decode=compression.SkipDecode(min_layers=18, horizon=4))
    usage = server.generate(compression=shallow, max_tokens=8).usage
    equal(usage.compression.plan.skip_decode.horizon, 4, "horizon of the plan")
    check(0 < usage.compression.attention_layers_run < usage.compression.dense_layers, usage)


def check_request_ids(server):
    equal(server.generate(request_id="given-in-message").request_id, "given-in-message", "request id")
    metadata = [("x-request-id", "given-in-metadata")]
    answer, call = server.generation.Generate.with_call(request(), metadata=metadata)
    equal(answer.request_id, "given-in-metadata", "request id")
    equal(dict(call.initial_metadata())["x-request-id"], "given-in-metadata", "request id in the metadata")


def check_abort(server):
    call = server.stream(request_id="to-abort", **server.endless())
    reason = None
    for event in call:
        if event.WhichOneof("event") == "delta" and reason is None:
            reason = gen.FINISH_REASON_UNSPECIFIED
            server.generation.Abort(gen.AbortRequest(request_id="to-abort"))
        elif event.WhichOneof("event") == "finished":
            reason = event.finished.finish_reason
    equal(reason, gen.FINISH_REASON_ABORT, "finish reason")
    server.is_gone("to-abort")
    with raises(grpc.RpcError, "no id") as caught:
        server.generation.Abort(gen.AbortRequest())
    equal(caught[0].code(), grpc.StatusCode.INVALID_ARGUMENT, "no id")


def check_cancelled_stream(server):
    call = server.stream(request_id="cancelled-stream", n=2, **server.endless())
    for event in call:
        if event.WhichOneof("event") == "delta":
            break
    call.cancel()
    eventually(server.idle, "a cancelled stream frees its sequences")
    server.is_gone("cancelled-stream")


def check_cancelled_unary(server):
    asked = request(request_id="cancelled-unary", **server.endless())
    call = server.generation.Generate.future(asked)
    if server.http_url:
        eventually(lambda: not server.idle(), "the request runs")
    call.cancel()
    eventually(server.idle, "a cancelled call frees its sequences")


def check_deadline(server):
    asked = request(request_id="late", **server.endless())
    for call in (server.generation.Generate, lambda *a, **k: list(server.generation.GenerateStream(*a, **k))):
        with raises(grpc.RpcError, "a deadline") as caught:
            call(asked, timeout=0.5)
        equal(caught[0].code(), grpc.StatusCode.DEADLINE_EXCEEDED, "a deadline")
        eventually(server.idle, "a late call frees its sequences")


def check_health(server):
    serving = health_pb2.HealthCheckResponse.SERVING
    names = ["", "rheostat.v1.GenerationService", "inference.GRPCInferenceService"]
    for name in names:
        status = server.health.Check(health_pb2.HealthCheckRequest(service=name)).status
        equal(status, serving, f"health of {name!r}")
    with raises(grpc.RpcError, "an unknown service") as caught:
        server.health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    equal(caught[0].code(), grpc.StatusCode.NOT_FOUND, "an unknown service")
    watch = server.health.Watch(health_pb2.HealthCheckRequest())
    equal(next(watch).status, serving, "watched health")
    watch.cancel()


def check_reflection(server):
    symbol = "rheostat.v1.GenerationService"
    asked = [
        reflection.ServerReflectionRequest(list_services=""),
        reflection.ServerReflectionRequest(file_containing_symbol=symbol),
        reflection.ServerReflectionRequest(file_by_filename="google/protobuf/struct.proto"),
    ]
    for version in ("v1", "v1alpha"):  # The same messages under two names.
        call = server.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection.ServerReflectionResponse.FromString,
        )
        services, file, imported = list(call(iter(asked)))
        names = {service.name for service in services.list_services_response.service}
        check({symbol, "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names, f"{names}")
        check(file.file_descriptor_response.file_descriptor_proto, f"{version}: file of {symbol}")
        check(imported.file_descriptor_response.file_descriptor_proto, f"{version}: imported file")


def check_energy_and_budgets(server):
    usage = server.generate().usage.energy
    check(usage.joules > 0 and usage.source != gen.ENERGY_SOURCE_UNSPECIFIED, f"energy: {usage}")
    late = server.generate(**server.endless(), deadline_seconds=0.3)
    equal(late.choices[0].finish_reason, gen.FINISH_REASON_DEADLINE, "a request past its deadline")
    events = list(server.stream(**server.endless(), max_joules=late.usage.energy.joules / 2))
    equal(events[-2].finished.finish_reason, gen.FINISH_REASON_MAX_JOULES, "a request of half the joules")
    check(events[-1].completed.usage.energy.joules > 0, f"the last event has them: {events[-1]}")
    refused(server, grpc.StatusCode.INVALID_ARGUMENT, "max_joules", max_joules=float("nan"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of the gRPC server")
    parser.add_argument("--http-url", help="http://host:port of the same server")
    arguments = parser.parse_args()
    run_all(sys.modules[__name__], Server(arguments.address, arguments.http_url))
    finish()


if __name__ == "__main__":
    main()

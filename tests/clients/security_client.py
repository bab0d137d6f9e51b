"""Checks API keys, their limits and TLS with the official OpenAI client, grpcio and tritonclient.

Usage: security_client.py --base-url https://HOST:PORT --grpc HOST:PORT --ca FILE --free KEY --limited KEY --operator KEY

`limited` may use 60 tokens at once and 6 a minute, one request at a time.
"""

import argparse
import http.client
import ssl
import sys
import urllib.error
import urllib.request

import grpc
import openai
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from checks import check, equal, finish, raises, run_all

PROMPT = "The capital of France is"


class Server:
    """Where the server is, and the keys to it."""

    def __init__(self, options):
        self.options = options
        self.tls = ssl.create_default_context(cafile=options.ca)
        with open(options.ca, "rb") as file:
            self.channel = grpc.secure_channel(options.grpc, grpc.ssl_channel_credentials(file.read()))

    def openai(self, key):
        http = openai.DefaultHttpxClient(verify=self.tls)
        base_url = f"{self.options.base_url}/v1"
        return openai.OpenAI(base_url=base_url, api_key=key, http_client=http, max_retries=0, timeout=120)

    def status(self, path, key=None, method="GET"):
        """The status of a plain request."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.options.base_url + path, headers=headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=60, context=self.tls).status
        except urllib.error.HTTPError as error:
            return error.code

    def page(self):
        url = f"{self.options.base_url}/metrics"
        return urllib.request.urlopen(url, timeout=60, context=self.tls).read().decode()


def complete(client, **fields):
    return client.completions.create(**({"model": "", "prompt": PROMPT, "max_tokens": 4, "temperature": 0} | fields))


def bearer(key):
    return (("authorization", f"Bearer {key}"),)


def refused(code, call, what):
    with raises(grpc.RpcError, what) as caught:
        call()
    equal(caught[0].code(), code, what)
    return caught[0]


def check_certificate_is_checked(server):
    with raises(openai.APIConnectionError, "an unknown certificate"):
        client = openai.OpenAI(base_url=f"{server.options.base_url}/v1", api_key=server.options.free, max_retries=0)
        client.models.list()
    with raises(http.client.BadStatusLine, "plain text"):
        urllib.request.urlopen(server.options.base_url.replace("https", "http") + "/health", timeout=60)


def check_key_is_needed(server):
    client = server.openai(server.options.free)
    answer = complete(client)
    check("Paris" in answer.choices[0].text, f"text: {answer}")
    check(list(client.models.list()), "models")
    for wrong in ("none", server.options.free[:-1], server.options.free + "0"):
        with raises(openai.AuthenticationError, wrong) as caught:
            complete(server.openai(wrong))
        equal((caught[0].code, caught[0].type), ("invalid_api_key", "invalid_request_error"), "OpenAI's shape")
        equal(caught[0].response.headers["www-authenticate"], "Bearer", "scheme")
        check(wrong not in caught[0].message, "an answer never repeats a key")
    for path in ("/v1/models", "/tokenizer_info", "/version", "/openapi.json", "/nowhere"):
        equal(server.status(path), 401, path)
    for path in ("/health", "/ready", "/metrics"):
        equal(server.status(path), 200, path)


def check_operators_endpoints(server):
    path = "/admin/requests/none/abort"
    for key, status in ((None, 401), (server.options.free, 403), (server.options.operator, 404)):
        equal(server.status(path, key, "POST"), status, f"{path} with {key and key[:6]}")


def check_limits_are_a_keys_own(server):
    limited, free = server.openai(server.options.limited), server.openai(server.options.free)
    # Prompt and output are 5 + 50 of the 60 tokens that may be taken.
    used = complete(limited, max_tokens=50, extra_body={"ignore_eos": True}).usage.total_tokens
    equal(used, 55, "tokens")
    with raises(openai.RateLimitError, "over the bucket") as caught:
        complete(limited, max_tokens=20)
    wait = int(caught[0].response.headers["retry-after"])
    check(150 < wait <= 200, f"20 of 25 tokens, at 6 a minute: {wait} s")
    equal(caught[0].type, "rate_limit_error", "type")
    check(complete(free, max_tokens=50).choices, "others are not concerned")
    page = server.page()
    check('rheostat_key_requests_refused_total{key="limited",limit="tokens"} 1' in page, "refusals are counted")
    check('rheostat_key_tokens_total{key="limited"} 55' in page, "tokens are counted")
    for key in vars(server.options).values():
        check(len(key) < 60 or key not in page, "no key is in the metrics")


def check_grpc(server):
    inference = service_pb2_grpc.GRPCInferenceServiceStub(server.channel)
    model = service_pb2.ModelMetadataRequest(name="smollm2-135m")
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    refused(unauthenticated, lambda: inference.ModelMetadata(model, timeout=60), "no key")
    refused(unauthenticated, lambda: inference.ModelMetadata(model, timeout=60, metadata=bearer("x")), "no such key")
    known = bearer(server.options.free)
    equal(inference.ModelMetadata(model, timeout=60, metadata=known).name, "smollm2-135m", "a known key")
    check(inference.ServerReady(service_pb2.ServerReadyRequest(), timeout=60).ready, "probes need none")
    health = health_pb2_grpc.HealthStub(server.channel)
    status = health.Check(health_pb2.HealthCheckRequest(), timeout=60).status
    equal(status, health_pb2.HealthCheckResponse.SERVING, "nor does health")
    reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    ask = lambda metadata: list(  # noqa: E731
        reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=60, metadata=metadata
        )
    )
    refused(unauthenticated, lambda: ask(()), "reflection")
    check(ask(known), "reflection with a key")


def check_grpc_limits(server):
    inference = service_pb2_grpc.GRPCInferenceServiceStub(server.channel)
    text = service_pb2.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(PROMPT.encode())
    request = service_pb2.ModelInferRequest(model_name="smollm2-135m", inputs=[text])
    request.parameters["max_tokens"].int64_param = 40
    call = lambda key: inference.ModelInfer(request, timeout=60, metadata=bearer(key))  # noqa: E731
    error = refused(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: call(server.options.limited), "over the bucket")
    wait = int(dict(error.trailing_metadata())["retry-after"])
    check(wait > 100, f"retry-after: {wait}")
    check(call(server.options.free).outputs, "others are not concerned")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("base-url", "grpc", "ca", "free", "limited", "operator"):
        parser.add_argument(f"--{option}", required=True)
    run_all(sys.modules[__name__], Server(parser.parse_args()))
    finish()


if __name__ == "__main__":
    main()

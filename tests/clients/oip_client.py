"""Checks the Open Inference Protocol with Triton's own client, and our proto against that client's.

Usage: oip_client.py ADDRESS
"""

import argparse
import json
import pathlib
import queue
import sys
import tempfile

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from checks import check, equal, finish, raises, run_all

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 12}


class Server:
    """Triton's client, and the name of the only model."""

    def __init__(self, address):
        self.address = address
        self.client = triton.InferenceServerClient(address)
        self.model = self.client.get_model_metadata("").name

    def infer(self, inputs, outputs=None, **fields):
        requested = outputs and [triton.InferRequestedOutput(name) for name in outputs]
        return self.client.infer(self.model, inputs, outputs=requested, **fields)


class Stream:
    """A stream of requests: what comes back, by the request's id."""

    def __init__(self, server):
        self.model = server.model
        self.client = triton.InferenceServerClient(server.address)
        self.responses = queue.Queue()
        self.client.start_stream(lambda result, error: self.responses.put((result, error)))

    def send(self, inputs, model=None, enable_empty_final_response=True, **fields):
        fields["enable_empty_final_response"] = enable_empty_final_response
        self.client.async_stream_infer(model or self.model, inputs, **fields)

    def receive(self):
        return self.responses.get(timeout=60)

    def until_final(self):
        """The results up to the empty final response."""
        results = []
        while True:
            result, error = self.receive()
            check(error is None, f"error in the stream: {error}")
            if result.get_response().parameters["triton_final_response"].bool_param:
                return results
            results.append(result)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def tensor(name, value):
    """One element, of the datatype that fits it."""
    datatype, array = ("BOOL", np.array([value])) if isinstance(value, bool) else ("BYTES", None)
    made = triton.InferInput(name, [1], datatype)
    made.set_data_from_numpy(np.array([value.encode()], dtype=np.object_) if array is None else array)
    return made


def tensors(sampling=GREEDY, prompt=PROMPT, **flags):
    made = [tensor("text_input", prompt), tensor("sampling_parameters", json.dumps(sampling))]
    return made + [tensor(name, value) for name, value in flags.items()]


def texts(result):
    return [text.decode() for text in result.as_numpy("text_output")]


def reasons(result):
    return [reason.decode() for reason in result.as_numpy("finish_reason")]


def check_proto_is_tritons(_server):
    """Every message, field and call of our proto is the client's, by name, number, type and label."""
    with tempfile.NamedTemporaryFile() as compiled:
        source = "inference/grpc_predict_v2.proto"
        if protoc.main(["protoc", f"-I{PROTO}", f"--descriptor_set_out={compiled.name}", source]):
            raise AssertionError("our proto does not compile")
        ours = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(compiled.name).read_bytes()).file[0]
    theirs = {}
    for module in (service_pb2, model_config_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        equal(ours.package, file.package, "package")
        theirs |= {message.name: message for message in file.message_type}
        theirs |= {enum.name: enum for enum in file.enum_type}
        theirs |= {service.name: service for service in file.service}
    for message in ours.message_type:
        compare_message(message, theirs[message.name])
    for enum in ours.enum_type:
        equal(values(enum), values(theirs[enum.name]), f"enum {enum.name}")
    for service in ours.service:
        calls = {call.name: call for call in theirs[service.name].method}
        for call in service.method:
            equal(shape(call), shape(calls[call.name]), f"call {call.name}")


def shape(call):
    return call.input_type, call.output_type, call.client_streaming, call.server_streaming


def values(enum):
    return [(value.name, value.number) for value in enum.value]


def compare_message(ours, theirs):
    fields = {field.name: field for field in theirs.field}
    for field in ours.field:
        other = fields.get(field.name)
        check(other is not None, f"{ours.name} has no field {field.name}")
        for part in ("number", "type", "label", "type_name"):
            equal(getattr(field, part), getattr(other, part), f"{part} of {ours.name}.{field.name}")
        equal(field.HasField("oneof_index"), other.HasField("oneof_index"), f"oneof of {ours.name}.{field.name}")
    nested = {message.name: message for message in theirs.nested_type}
    for message in ours.nested_type:
        compare_message(message, nested[message.name])


def check_liveness(server):
    check(server.client.is_server_live(), "the server is live")
    check(server.client.is_server_ready(), "the server is ready")
    check(server.client.is_model_ready(server.model), "the model is ready")
    check(server.client.is_model_ready(server.model, "1"), "its version is ready")
    check(not server.client.is_model_ready(server.model, "2"), "another version is not")
    check(not server.client.is_model_ready("no-such-model"), "another model is not")


def check_metadata(server):
    info = server.client.get_server_metadata()
    equal(info.name, "rheostat", "server")
    check(info.version, "version")
    model = server.client.get_model_metadata(server.model)
    equal(list(model.versions), ["1"], "versions")
    inputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in model.inputs}
    equal(inputs["text_input"], ("BYTES", [1]), "text_input")
    equal(inputs["stream"], ("BOOL", [1]), "stream")
    check("text_output" in {tensor.name for tensor in model.outputs}, "text_output")
    with raises(InferenceServerException, "an unknown model") as caught:
        server.client.get_model_metadata("no-such-model")
    equal(caught[0].status(), "StatusCode.NOT_FOUND", "an unknown model")


def check_config(server):
    config = server.client.get_model_config(server.model, as_json=True)["config"]
    equal(config["name"], server.model, "name")
    equal(config["backend"], "rheostat", "backend")
    check(config["model_transaction_policy"]["decoupled"], "a request may have many responses")
    types = {tensor["name"]: tensor["data_type"] for tensor in config["input"]}
    equal((types["text_input"], types["stream"]), ("TYPE_STRING", "TYPE_BOOL"), "inputs")
    optional = {tensor["name"] for tensor in config["input"] if tensor.get("optional")}
    check("text_input" not in optional and "sampling_parameters" in optional, f"optional: {optional}")


def check_infer(server):
    result = server.infer(tensors(), request_id="42")
    equal(result.get_response().id, "42", "id")
    equal(result.get_response().model_name, server.model, "model")
    (text,) = texts(result)
    check(text.startswith(PROMPT) and len(text) > len(PROMPT), f"text: {text!r}")
    (bare,) = texts(server.infer(tensors(exclude_input_in_output=True)))
    equal(PROMPT + bare, text, "the prompt is left out")
    check(reasons(result)[0] in ("stop", "length"), f"reason: {reasons(result)}")
    (count,) = result.as_numpy("num_output_tokens")
    check(0 < count <= 12 and result.as_numpy("num_input_tokens")[0] > 0, "token counts")
    only = server.infer(tensors(), outputs=["text_output"])
    equal([output.name for output in only.get_response().outputs], ["text_output"], "requested outputs")
    by_parameters = server.client.infer(
        server.model, [tensor("text_input", PROMPT)], parameters={"temperature": 0, "max_tokens": 12}
    )
    equal(texts(by_parameters), [text], "sampling parameters outside the tensor")
    as_strings = server.infer(tensors({"temperature": "0", "max_tokens": "12"}))
    equal(texts(as_strings), [text], "sampling parameters as strings")


def check_choices(server):
    result = server.infer(tensors({"temperature": 1.5, "seed": 3, "n": 2, "max_tokens": 8}))
    equal((len(texts(result)), len(reasons(result))), (2, 2), "choices")
    equal(list(result.as_numpy("num_output_tokens").shape), [2], "counts a choice")


def check_errors(server):
    def refused(status, call):
        with raises(InferenceServerException, status) as caught:
            call()
        equal(caught[0].status(), f"StatusCode.{status}", caught[0].message())
        return caught[0].message()

    check("stream" in refused("INVALID_ARGUMENT", lambda: server.infer(tensors(stream=True))), "names `stream`")
    refused("NOT_FOUND", lambda: server.client.infer("no-such-model", tensors()))
    refused("NOT_FOUND", lambda: server.infer(tensors(), model_version="2"))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors({"temprature": 1})))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors({"max_tokens": -1})))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors({"temperature": "nan"})))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors(prompt="")))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors(no_such_input=True)))
    refused("INVALID_ARGUMENT", lambda: server.infer(tensors(), outputs=["logits"]))
    refused("INVALID_ARGUMENT", lambda: server.client.infer(server.model, tensors()[1:]))
    check(texts(server.infer(tensors())), "the server goes on")


def check_stream(server):
    (whole,) = texts(server.infer(tensors(exclude_input_in_output=True)))
    with Stream(server) as stream:
        stream.send(tensors(stream=True), request_id="deltas")
        results = stream.until_final()
        check(len(results) > 2, f"{len(results)} responses are no stream")
        equal("".join(texts(result)[0] for result in results), whole, "streamed and whole text")
        check({result.get_response().id for result in results} == {"deltas"}, "ids")
        check(reasons(results[-1])[0] in ("stop", "length"), "the last response says why")
        check(not any(reasons(result)[0] for result in results[:-1]), "no other does")
        stream.send(tensors(exclude_input_in_output=True))
        equal([texts(result) for result in stream.until_final()], [[whole]], "one response unless streamed")


def check_final_flag(server):
    with Stream(server) as stream:
        stream.send(tensors(stream=True), enable_empty_final_response=False)
        final = False
        while not final:
            result, error = stream.receive()
            check(error is None, f"error in the stream: {error}")
            final = result.get_response().parameters["triton_final_response"].bool_param
        check(result.as_numpy("finish_reason") is not None, "the last response is no empty one")


def check_concurrent_requests(server):
    prompts = {str(i): f"Once upon a time there were {i}" for i in range(2, 10)}
    expected = {}
    for name, prompt in prompts.items():
        (expected[name],) = texts(server.infer(tensors(prompt=prompt, exclude_input_in_output=True)))
    got, final, order = dict.fromkeys(prompts, ""), set(), []
    with Stream(server) as stream:
        for name, prompt in prompts.items():
            stream.send(tensors(prompt=prompt, stream=True), request_id=name)
        while len(final) < len(prompts):
            result, error = stream.receive()
            check(error is None, f"error in the stream: {error}")
            response = result.get_response()
            order.append(response.id)
            if response.parameters["triton_final_response"].bool_param:
                final.add(response.id)
            else:
                got[response.id] += texts(result)[0]
    equal(got, expected, "each request's text")
    switches = sum(a != b for a, b in zip(order, order[1:]))
    check(switches > len(prompts), "requests of one stream run at once")


def check_stream_survives_errors(server):
    with Stream(server) as stream:
        stream.send(tensors({"temprature": 1}), request_id="bad")
        result, error = stream.receive()
        check(error is not None and "temprature" in error.message(), f"error: {error}")
        stream.send(tensors(), model="no-such-model")
        _, error = stream.receive()
        check(error is not None and "no-such-model" in error.message(), f"error: {error}")
        stream.send(tensors(stream=True, exclude_input_in_output=False))
        _, error = stream.receive()
        check(error is not None and "exclude_input_in_output" in error.message(), f"error: {error}")
        stream.send(tensors(stream=True))
        check(stream.until_final(), "the stream goes on")


def check_cancelled_stream(server):
    with Stream(server) as stream:
        endless = {"temperature": 0, "max_tokens": 1000, "ignore_eos": True}
        stream.send(tensors(endless, stream=True))
        stream.receive()
    check(texts(server.infer(tensors())), "the server goes on")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of the gRPC server")
    run_all(sys.modules[__name__], Server(parser.parse_args().address))
    finish()


if __name__ == "__main__":
    main()

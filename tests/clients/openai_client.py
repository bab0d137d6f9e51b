"""Checks the OpenAI API with the official client.

Usage: openai_client.py --base-url http://HOST:PORT/v1
"""

import argparse
import sys

import openai

from checks import check, equal, eventually, finish, raises, run_all

PROMPT = "The capital of France is"
CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name three colours."},
]


class Server:
    """The client, and the name of the only model."""

    def __init__(self, base_url):
        self.base_url = base_url
        # No retries: a check wants to see the first answer.
        self.client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
        (self.model,) = (model.id for model in self.client.models.list())

    def complete(self, **fields):
        defaults = {"model": self.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        return self.client.completions.create(**(defaults | fields))

    def chat(self, **fields):
        defaults = {"model": self.model, "messages": CHAT, "max_tokens": 12, "temperature": 0}
        return self.client.chat.completions.create(**(defaults | fields))

    def gauge(self, name):
        """The value of one of the server's gauges."""
        page = self.client.with_options(base_url=self.base_url.removesuffix("/v1"))
        text = page.get("/metrics", cast_to=str)
        for line in text.splitlines():
            if line.split(" ")[0].split("{")[0] == name:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"/metrics has no {name}")

    def idle(self):
        return self.gauge("rheostat_sequences_running") + self.gauge("rheostat_sequences_waiting") == 0


def refused(kind, param, call, **fields):
    """The call fails with an error of `kind` in OpenAI's shape that names the field."""
    what = str(fields)[:80]
    with raises(kind, what) as caught:
        call(**fields)
    error = caught[0]
    check(error.message and isinstance(error.body, dict), f"body: {error.body}")
    check(error.type, f"type: {error.body}")
    if param:
        equal(error.param, param, f"param of {what}: {error.message}")
    return error


def check_models(server):
    model = server.client.models.retrieve(server.model)
    equal((model.id, model.object), (server.model, "model"), "model")
    check(model.created > 0 and model.owned_by, f"model: {model}")
    refused(openai.NotFoundError, None, server.client.models.retrieve, model="no-such-model")


def check_completion(server):
    answer = server.complete()
    equal(answer.object, "text_completion", "object")
    equal(answer.model, server.model, "model")
    check(answer.id and answer.created > 0, "id and time")
    (choice,) = answer.choices
    check(choice.text and choice.finish_reason in ("stop", "length"), f"choice: {choice}")
    usage = answer.usage
    check(0 < usage.completion_tokens <= 12 and usage.prompt_tokens > 0, f"usage: {usage}")
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total tokens")
    check(choice.logprobs is None, "no log-probabilities unless asked for")


def check_completion_stream(server):
    whole = server.complete()
    chunks = list(server.complete(stream=True, stream_options={"include_usage": True}))
    equal("".join(c.choices[0].text for c in chunks if c.choices), whole.choices[0].text, "text")
    equal(chunks[-1].choices, [], "the last chunk has only usage")
    equal(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens, "completion tokens")
    equal(len({c.id for c in chunks}), 1, "one id")
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    equal(reasons, [whole.choices[0].finish_reason], "one finish reason")
    without = list(server.complete(stream=True))
    check(all(c.choices and c.usage is None for c in without), "usage comes only when asked for")


def check_prompt_lists(server):
    prompts = [PROMPT, "One, two, three,"]
    answer = server.complete(prompt=prompts)
    equal([c.index for c in answer.choices], [0, 1], "choices")
    solo = [server.complete(prompt=prompt).choices[0].text for prompt in prompts]
    equal([c.text for c in answer.choices], solo, "a list of prompts")


def check_scoring(server):
    """As evaluation harnesses score a text: nothing generated, every prompt token's log-probability."""
    answer = server.complete(echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer.choices
    equal(choice.text, PROMPT, "echo")
    scored = choice.logprobs
    equal(len(scored.tokens), answer.usage.prompt_tokens, "tokens")
    equal(len(scored.token_logprobs), len(scored.tokens), "log-probabilities")
    equal(len(scored.text_offset), len(scored.tokens), "offsets")
    check(scored.token_logprobs[0] is None, "nothing precedes the first token")
    check(all(x <= 0 for x in scored.token_logprobs[1:]), f"{scored.token_logprobs}")
    check(all(scored.top_logprobs[1:]), "alternatives")
    equal(answer.usage.completion_tokens, 0, "completion tokens")
    more = server.complete(echo=True, logprobs=1, max_tokens=4)
    extended = more.choices[0].logprobs.tokens
    equal(len(extended), answer.usage.prompt_tokens + more.usage.completion_tokens, "prompt and completion")
    equal(more.choices[0].text, PROMPT + server.complete(max_tokens=4).choices[0].text, "echoed text")


def check_choices_and_seed(server):
    first = server.complete(n=2, temperature=1.5, seed=11)
    equal([c.index for c in first.choices], [0, 1], "choices")
    check(first.choices[0].text != first.choices[1].text, "choices differ")
    again = server.complete(n=2, temperature=1.5, seed=11)
    equal([c.text for c in again.choices], [c.text for c in first.choices], "the same seed")
    texts = ["", ""]
    for chunk in server.complete(n=2, temperature=1.5, seed=11, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    equal(texts, [c.text for c in first.choices], "streamed choices")


def check_stop(server):
    whole = server.complete(max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, [stop, "never seen"]):
        choice = server.complete(max_tokens=24, stop=given).choices[0]
        equal((choice.text, choice.finish_reason), (whole[: whole.index(stop)], "stop"), f"stop={given!r}")
    streamed = server.complete(max_tokens=24, stop=stop, stream=True)
    equal("".join(c.choices[0].text for c in streamed), whole[: whole.index(stop)], "streamed stop")


def check_logit_bias(server):
    tokens = server.client.with_options(base_url=server.base_url.removesuffix("/v1"))
    body = {"prompt": " Paris", "add_special_tokens": False}
    first = tokens.post("/tokenize", body=body, cast_to=object)["tokens"][0]
    forced = server.complete(max_tokens=3, logit_bias={str(first): 100}, logprobs=0).choices[0]
    equal(len(set(forced.logprobs.tokens)), 1, f"one token again and again: {forced.logprobs.tokens}")


def check_chat(server):
    answer = server.chat()
    equal(answer.object, "chat.completion", "object")
    (choice,) = answer.choices
    equal(choice.message.role, "assistant", "role")
    check(choice.message.content and choice.finish_reason in ("stop", "length"), f"choice: {choice}")
    check(answer.usage.prompt_tokens > 0, f"usage: {answer.usage}")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name three colours."}]}]
    whole = [{"role": "user", "content": "Name three colours."}]
    same = [server.chat(messages=messages).choices[0].message.content for messages in (parts, whole)]
    equal(same[0], same[1], "content as parts and as text")
    equal(server.chat(max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens, 3, "limit")


def check_chat_stream(server):
    whole = server.chat()
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    equal(chunks[0].object, "chat.completion.chunk", "object")
    equal(chunks[0].choices[0].delta.role, "assistant", "the first delta has the role")
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    equal(text, whole.choices[0].message.content, "text")
    equal(chunks[-1].choices, [], "the last chunk has only usage")
    equal(chunks[-1].usage.total_tokens, whole.usage.total_tokens, "usage")
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    equal(reasons, [whole.choices[0].finish_reason], "one finish reason")


def check_chat_logprobs(server):
    answer = server.chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    check(0 < len(content) <= answer.usage.completion_tokens, "one entry a token")
    for scored in content:
        equal(len(scored.top_logprobs), 3, "alternatives")
        check(scored.logprob <= 0, f"log-probability {scored.logprob}")
        best = max(scored.top_logprobs, key=lambda top: top.logprob)
        check(abs(best.logprob - scored.logprob) < 1e-4, "greedy takes the likeliest")
    streamed = server.chat(logprobs=True, top_logprobs=3, stream=True)
    parts = [c.choices[0].logprobs for c in streamed if c.choices and c.choices[0].logprobs]
    tokens = [scored.token for part in parts for scored in part.content]
    equal(tokens, [scored.token for scored in content], "streamed tokens")


def check_bad_requests(server):
    bad = openai.BadRequestError
    for fields in (
        {"prompt": ""},
        {"prompt": [4_000_000_000]},
        {"prompt": "word " * 100_000},
        {"max_tokens": -1},
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"n": 1_000_000},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"logprobs": 1_000_000},
        {"stop": ["x"] * 10_000},
        {"logit_bias": {"4000000000": 1}},
        {"temperature": "hot"},
    ):
        param = None if fields.keys() & {"prompt"} or fields.get("temperature") == "hot" else next(iter(fields))
        error = refused(bad, param, server.complete, **fields)
        equal((error.status_code, error.type), (400, "invalid_request_error"), str(fields)[:80])
    for fields in ({"messages": []}, {"top_logprobs": 3}, {"messages": [{"content": "no role"}]}):
        refused(bad, None, server.chat, **fields)
    error = refused(openai.NotFoundError, "model", server.complete, model="no-such-model")
    equal(error.status_code, 404, "an unknown model")
    refused(openai.NotFoundError, "model", server.chat, model="no-such-model")
    refused(bad, None, server.complete, prompt="", stream=True)
    check(server.complete().choices, "the server goes on")


def check_extra_fields(server):
    plain = server.complete().choices[0].text
    unknown = {"no_such_field": {"deep": [1, 2]}, "service_tier_of_another_vendor": "gold"}
    equal(server.complete(extra_body=unknown).choices[0].text, plain, "unknown fields are ignored")
    dense = {"compression": {"profile": "dense"}}
    equal(server.complete(extra_body=dense).choices[0].text, plain, "the dense profile")
    bad = openai.BadRequestError
    refused(bad, None, server.complete, extra_body={"compression": {"profile": "no-such-profile"}})
    error = refused(bad, None, server.complete, extra_body={"compression": {"think": {"ratio": 1.4}}})
    check("think" in error.message, f"the option is named: {error.message}")
    mixed = {"compression": {"drop": {"attention": 2}, "skip_decode": {"min_layers": 20}}}
    used = server.complete(max_tokens=8, extra_body=mixed).usage.compression
    equal(used["plan"]["drop"], {"attention": 2}, "what the shipped calibration makes possible")
    skips = {"compression": {"ffn_skip": {"target": 0.25, "warmup": 2}}}
    used = server.complete(max_tokens=24, extra_body=skips).usage.compression
    check(used["ffn_layers_skipped"] > 0, f"blocks were skipped: {used}")
    check(used["ffn_layers_run"] + used["ffn_layers_skipped"] == used["dense_layers"], f"all are counted: {used}")
    think = {"compression": {"think": {"ratio": 0.4, "recent": 32}}}
    long = "A line of a long prompt. " * 120
    used = [server.complete(prompt=long, max_tokens=8, extra_body=body).usage.compression for body in ({}, think)]
    check(used[1]["kv_bytes"] < 0.9 * used[0]["kv_bytes"], f"pruned keys take fewer pages: {used}")
    both = {"compression": {"ffn_skip": {}, "skip_decode": {}}}
    error = refused(bad, None, server.complete, extra_body=both)
    check("ffn_skip" in error.message and "skip_decode" in error.message, error.message)
    shallow = {"compression": {"skip_decode": {"min_layers": 18, "horizon": 4}}}
    used = server.complete(max_tokens=8, extra_body=shallow).usage.compression
    equal(used["plan"]["skip_decode"]["horizon"], 4, "the plan comes back")
    check(0 < used["attention_layers_run"] < used["dense_layers"], f"fewer layers ran: {used}")
    schema = {"type": "json_object"}
    error = refused(bad, None, server.chat, response_format=schema)
    check("response_format" in error.message, f"an unsupported field is named: {error.message}")
    header = {"x-rheostat-profile": "no-such-profile"}
    refused(bad, None, server.complete, extra_headers=header)


def check_energy_and_budgets(server):
    energy = server.complete().usage.energy
    check(energy["joules"] > 0 and energy["source"] in ("nvml", "rapl", "estimate"), f"energy: {energy}")
    endless = {"max_tokens": 1_500, "extra_body": {"ignore_eos": True, "deadline": 0.3}}
    for call in (server.complete, server.chat):
        (choice,) = call(**endless).choices
        # A reason of OpenAI's, for clients with types, and beside it the budget.
        equal((choice.finish_reason, choice.stop_reason), ("length", "deadline"), "a request past its deadline")
    *_, last, usage = server.chat(**endless, stream=True, stream_options={"include_usage": True})
    equal((last.choices[0].finish_reason, last.choices[0].stop_reason), ("length", "deadline"), "streamed")
    spent = usage.usage.energy["joules"]
    body = {"ignore_eos": True, "max_joules": spent / 2}
    answer = server.complete(max_tokens=1_500, extra_body=body)
    equal((answer.choices[0].finish_reason, answer.choices[0].stop_reason), ("length", "max_joules"), "half of it")
    refused(openai.BadRequestError, "max_joules", server.complete, extra_body={"max_joules": -1})


def check_request_id(server):
    raw = server.client.completions.with_raw_response
    fields = {"model": server.model, "prompt": PROMPT, "max_tokens": 1}
    answer = raw.create(**fields, extra_headers={"x-request-id": "given-by-client"})
    equal(answer.headers["x-request-id"], "given-by-client", "request id")


def check_cancelled_stream(server):
    endless = {"max_tokens": 1_500, "stream": True, "extra_body": {"ignore_eos": True}}
    for call in (server.complete, server.chat):
        stream = call(**endless, n=2)
        next(iter(stream))
        eventually(lambda: not server.idle(), "the request runs")
        stream.close()
        eventually(server.idle, "a closed stream frees its sequences")


def check_cancelled_call(server):
    """A client that stops waiting for a response that is not streamed."""
    impatient = server.client.with_options(timeout=0.5)
    with raises(openai.APITimeoutError, "a call that outlives its client"):
        impatient.completions.create(
            model=server.model, prompt=PROMPT, max_tokens=1_500, extra_body={"ignore_eos": True}
        )
    eventually(server.idle, "a lost client frees its sequences")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", required=True, help="http://HOST:PORT/v1")
    run_all(sys.modules[__name__], Server(parser.parse_args().base_url.rstrip("/")))
    finish()


if __name__ == "__main__":
    main()

"""Checks chats with images by the official OpenAI client.

Usage: vision_client.py --base-url http://HOST:PORT/v1 --pictures FOLDER --tokens N [--questions FILE]

FOLDER has `rgb.png`, `turned.jpg` and `lossy.webp`; an image takes N tokens of the prompt. FILE has questions about
pictures beside it, one a line, with the answers that the model must give to nine in ten.
"""

import argparse
import base64
import json
import struct
import sys
import zlib
from pathlib import Path

import openai

from checks import check, equal, finish, raises, run_all

TEXT = {"type": "text", "text": "What is it?"}


def part(data, kind="png"):
    """The content part that shows a file."""
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def png(width, height, data=b""):
    """A PNG file that claims a size."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Server:
    """The client, the only model, and the pictures."""

    def __init__(self, base_url, pictures, tokens, questions):
        self.client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
        (self.model,) = (model.id for model in self.client.models.list())
        self.pictures = pictures
        self.tokens = tokens
        self.questions = questions

    def chat(self, *content, **fields):
        defaults = {"model": self.model, "max_tokens": 8, "temperature": 0}
        messages = [{"role": "user", "content": list(content)}]
        return self.client.chat.completions.create(**(defaults | {"messages": messages} | fields))

    def picture(self, name):
        return part((self.pictures / name).read_bytes(), name.rsplit(".", 1)[1])


def check_an_image_takes_its_tokens(server):
    plain = server.chat(TEXT).usage.prompt_tokens
    one = server.chat(server.picture("rgb.png"), TEXT)
    check(one.choices[0].message.content is not None, f"{one}")
    more = one.usage.prompt_tokens - plain
    check(server.tokens <= more <= server.tokens + 3, f"{more} tokens more for an image of {server.tokens}")
    two = server.chat(server.picture("rgb.png"), server.picture("turned.jpg"), TEXT).usage.prompt_tokens
    equal(two - one.usage.prompt_tokens, more, "a second image")


def check_images_are_seen(server):
    scores = set()
    for name in ("rgb.png", "turned.jpg", "lossy.webp"):
        asked = [server.chat(server.picture(name), TEXT, logprobs=True) for _ in range(2)]
        first, again = (answer.choices[0].logprobs.content[0].logprob for answer in asked)
        equal(first, again, "the same image")
        scores.add(first)
    equal(len(scores), 3, "different images")
    cached = server.chat(server.picture("rgb.png"), TEXT).usage.prompt_tokens_details.cached_tokens
    check(cached >= server.tokens // 2, f"{cached} tokens of a prompt that was asked before came from the cache")


def check_streams_and_turns(server):
    messages = [
        {"role": "user", "content": [server.picture("rgb.png"), TEXT]},
        {"role": "assistant", "content": "A pattern."},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, server.picture("lossy.webp")]},
    ]
    whole = server.chat(messages=messages).choices[0].message.content
    chunks = server.chat(messages=messages, stream=True)
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks), whole, "the streamed text")


def check_image_tokens_are_dropped(server):
    keep = max(server.tokens // 9, 1)
    # Prefixes of their own: what a request runs does not depend on what was asked before.
    body = lambda vision: {"compression": {"vision": vision} if vision else {}, "cache_salt": f"dropping {vision}"}
    ask = lambda **vision: server.chat(server.picture("rgb.png"), TEXT, logprobs=True, extra_body=body(vision))
    used = lambda answer: answer.usage.model_extra["compression"]
    whole = used(ask())
    equal(whole["visual_tokens"], {"shown": server.tokens, "kept": server.tokens, "mean_kept": server.tokens}, "all")
    for vision in (
        {"keep": keep},
        {"keep": keep, "merge": 0.8, "key_rate": 0},
        {"keep": keep, "baseline": "pool"},
        {"keep": keep, "baseline": "random", "seed": 5},
    ):
        answer, again = ask(**vision), ask(**vision)
        usage, tokens = used(answer), used(answer)["visual_tokens"]
        equal(tokens["shown"], server.tokens, f"{vision}: tokens shown")
        check(1 <= tokens["kept"] <= keep <= tokens["mean_kept"] + 1, f"{vision}: {tokens}")
        check(usage["kv_bytes"] <= whole["kv_bytes"] and usage["plan"]["vision"]["keep"] == keep, f"{usage}")
        check(usage["attention_layers_run"] < whole["attention_layers_run"], f"{vision}: {usage}")
        score = lambda one: one.choices[0].logprobs.content[0].logprob
        equal(score(answer), score(again), f"{vision}: asked again")
    for vision, says in (
        ({"keep": 0}, "at least 1"),
        ({"baseline": "pool"}, "needs compression.vision.keep"),
        ({"layers": [1000]}, "layers of the model"),
        ({"merge": "much"}, "merge"),
    ):
        with raises(openai.BadRequestError, says) as caught:
            ask(**vision)
        check(says in caught[0].message, f"{caught[0].message} does not say {says!r}")


def check_what_cannot_be_shown_is_refused(server):
    good = (server.pictures / "rgb.png").read_bytes()
    bomb = png(4096, 4096, zlib.compress(bytes(4097 * 64)))
    url = lambda url: {"type": "image_url", "image_url": {"url": url}}
    for content, says in (
        (part(good[: len(good) // 2]), "damaged"),
        (part(png(20_000, 20_000)), "20000 × 20000 pixels"),
        (part(bomb), "damaged"),
        (part(b"GIF89a" + bytes(20)), "PNG, JPEG or WebP"),
        (part(b""), "PNG, JPEG or WebP"),
        (url("data:image/png;base64,@@@@"), "base64"),
        (url("https://example.com/a.png"), "does not fetch"),
        (url("http://127.0.0.1:1/a.png"), "does not fetch"),
        (url("http://169.254.169.254/latest/meta-data/"), "does not fetch"),
        (url("file:///etc/passwd"), "file: URLs"),
        ({"type": "image_url", "image_url": "data:,"}, "image_url.url"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
    ):
        with raises(openai.BadRequestError, says) as caught:
            server.chat(content, TEXT)
        check(says in caught[0].message, f"{caught[0].message} does not say {says!r}")
        equal(caught[0].param, "messages", "param")
    with raises(openai.BadRequestError, "many images"):
        server.chat(*[server.picture("rgb.png")] * 9, TEXT)
    check(server.chat(server.picture("rgb.png"), TEXT).choices, "the server goes on")


def check_what_is_seen_is_told(server):
    if server.questions is None:
        return
    asked = [json.loads(line) for line in server.questions.read_text().splitlines()]
    for compression in ({}, {"vision": {"keep": server.tokens // 3}}):
        wrong = []
        for row in asked:
            image = part((server.questions.parent / row["image"]).read_bytes())
            text = {"type": "text", "text": row["question"]}
            answer = server.chat(image, text, max_tokens=12, extra_body={"compression": compression})
            text = answer.choices[0].message.content.strip()
            if text.lower() != row["answer"]:
                wrong.append(f"{row['question']} {row['answer']!r}, not {text!r}")
        print(f"      {len(asked) - len(wrong)} of {len(asked)} answers are right with {compression}")
        check(len(wrong) * 10 <= len(asked), "; ".join(wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", required=True, help="http://HOST:PORT/v1")
    parser.add_argument("--pictures", required=True, type=Path)
    parser.add_argument("--tokens", required=True, type=int)
    parser.add_argument("--questions", type=Path)
    args = parser.parse_args()
    server = Server(args.base_url.rstrip("/"), args.pictures, args.tokens, args.questions)
    run_all(sys.modules[__name__], server)
    finish()


if __name__ == "__main__":
    main()

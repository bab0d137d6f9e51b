"""Trains the encoder, the projector and the decoder's adapter. README.md says how to run it."""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import export
import vision
from decoder import DTYPE, HIDDEN, Decoder, question_mask
from gguf import Gguf
from heldout import HELD_OUT_SEEDS
from questions import KINDS
from text import IMAGE_TOKEN, PREFIX, SLOT, Slots, build_tokenizer

READING = [KINDS.index(kind) for kind in ("number", "word", "character")]
IMAGE_TOKENS = vision.GRID * vision.GRID


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2's GGUF")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shipped weights")
    parser.add_argument("--state", type=Path, help="file of the whole state; read when it exists")
    parser.add_argument("--init", type=Path, help="shipped weights to start from, where there is no state")
    parser.add_argument("--seconds", type=float, default=540, help="end of this run, by the clock")
    parser.add_argument("--warm-up", type=float, default=75, help="seconds of the encoder alone, where there is no state")
    parser.add_argument("--warm-rate", type=float, default=2.0, help="learning rate of the encoder alone")
    parser.add_argument("--rates", type=float, nargs=2, default=(1.0, 0.1), help="learning rate, first and last")
    parser.add_argument("--few", type=float, nargs=2, default=(0.85, 0.4), help="share of steps with few tokens")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--warm-batch", type=int, default=384)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--max-steps", type=int, default=10**9, help="steps of each phase, for trials")
    parser.add_argument("--evaluate", type=int, default=128, help="held-out images of each set")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    return parser.parse_args()


class Model(torch.nn.Module):
    """Everything, with the sequence that it runs on: shared text, image, questions."""

    FEW = 192

    def __init__(self, base: Gguf, slots: Slots):
        super().__init__()
        self.tower, self.projector = vision.VisionModel(), vision.Projector(HIDDEN)
        self.heads, self.language = vision.Heads(), Decoder(base)
        prefix = slots.encode(PREFIX)
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)

    def look(self, images):
        with mixed(images.device):
            return self.tower(vision.normalise(images))

    def answer(self, features, ids, keep: int):
        """Hidden states of the questions `[batch, questions, SLOT, hidden]`, with `keep` of the image's tokens,
        drawn anew for each image, at their own positions."""
        batch, questions, _ = ids.shape
        with mixed(ids.device):
            image = self.projector(features).to(DTYPE)
        start = len(self.prefix)
        places = torch.arange(IMAGE_TOKENS, device=ids.device).expand(batch, -1)
        if keep < IMAGE_TOKENS:
            order = torch.rand(batch, IMAGE_TOKENS, device=ids.device).argsort(1)[:, :keep]
            places = order.sort(1).values
            image = image.gather(1, places[..., None].expand(-1, -1, HIDDEN))
        embed = self.language.embed
        x = torch.cat([embed(self.prefix).expand(batch, -1, -1), image, embed(ids.flatten(1))], 1)
        text = start + IMAGE_TOKENS + torch.arange(SLOT, device=ids.device).repeat(questions)
        before = torch.arange(start, device=ids.device).expand(batch, -1)
        positions = torch.cat([before, start + places, text.expand(batch, -1)], 1)
        mask = question_mask(start + keep, questions, SLOT, ids.device)
        return self.language(x, positions, mask)[:, start + keep :].view(batch, questions, SLOT, HIDDEN)

    def loss(self, batch, keep: int):
        features, first = self.look(batch["images"])
        with mixed(features.device):
            direct = self.heads(features, first, batch)
        hidden = self.answer(features, batch["ids"], keep)
        logits = self.language.logits(hidden[batch["wanted"]]).float()
        loss = F.cross_entropy(logits, following(batch), reduction="none")
        # Reading is learned last: few questions ask for it.
        reads = torch.isin(batch["kinds"], batch["kinds"].new_tensor(READING))
        weight = (1.0 + 3.0 * reads)[..., None].expand_as(batch["wanted"])[batch["wanted"]]
        return (loss * weight).sum() / weight.sum(), direct


def mixed(device):
    return torch.autocast(device.type, DTYPE, enabled=DTYPE != torch.float32)


def following(batch):
    """The tokens that the wanted positions are to predict."""
    return batch["ids"].roll(-1, 2)[batch["wanted"]]


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def optimizer(model: Model):
    groups = [
        {"params": list(model.tower.parameters()), "base": 5e-4, "weight_decay": 0.02},
        {"params": list(model.heads.parameters()), "base": 1e-3, "weight_decay": 0.0},
        {"params": list(model.projector.parameters()), "base": 1e-3, "weight_decay": 0.0},
        {"params": [p for p in model.language.parameters() if p.requires_grad], "base": 1e-3, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def set_rate(optim, factor: float) -> None:
    for group in optim.param_groups:
        group["lr"] = group["base"] * factor


def step(model, optim, loss) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad(set_to_none=True)


class Run:
    """One call of this program: the clock, the batches, what is reported."""

    def __init__(self, args, model: Model, slots: Slots, device):
        self.args, self.model, self.slots, self.device = args, model, slots, device
        self.started, self.seen, self.optim = time.monotonic(), 0, optimizer(model)
        self.warmed = False

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def report(self, **values) -> None:
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps({"seconds": round(self.elapsed()), "images": self.seen, **values}), flush=True)

    def warm_up(self, until: float) -> None:
        """The encoder alone, on what the drawing program knows of each patch and of the image."""
        started = self.elapsed()
        batches = data.training(self.slots, self.args.warm_batch, self.seen, self.args.workers)
        for count, batch in enumerate(batches):
            progress = (self.elapsed() - started) / (until - started)
            if progress >= 1 or count >= self.args.max_steps:
                break
            set_rate(self.optim, min(1.0, count / 100) * self.args.warm_rate * (1 - 0.75 * progress))
            batch = to_device(batch, self.device)
            features, first = self.model.look(batch["images"])
            if count < 150 and self.args.init:
                # The heads are not shipped: they learn anew before they teach.
                features, first = features.detach(), first.detach()
            with mixed(features.device):
                loss = self.model.heads(features, first, batch)
            step(self.model, self.optim, loss)
            self.seen += len(batch["images"])
            if count % 50 == 0:
                self.report(phase="warm-up", loss=loss.item())
        self.warmed = True

    def joint(self, until: float) -> None:
        """Everything, on questions."""
        started, (rate, last) = self.elapsed(), self.args.rates
        chance, saved = random.Random(self.seen), self.elapsed()
        for count, batch in enumerate(data.training(self.slots, self.args.batch, self.seen, self.args.workers)):
            progress = (self.elapsed() - started) / (until - started)
            if progress >= 1 or count >= self.args.max_steps:
                break
            cosine = last + (rate - last) * 0.5 * (1 + math.cos(math.pi * progress))
            set_rate(self.optim, min(1.0, (count + 1) / 100) * cosine)
            few = self.args.few[0] + (self.args.few[1] - self.args.few[0]) * progress
            keep = Model.FEW if chance.random() < few else IMAGE_TOKENS
            batch = to_device(batch, self.device)
            loss, direct = self.model.loss(batch, keep)
            step(self.model, self.optim, loss + 0.2 * direct)
            self.seen += len(batch["images"])
            if count % 100 == 0:
                self.report(phase="joint", step=count, keep=keep, loss=loss.item(), direct=direct.item())
            if self.elapsed() - saved > 120:
                self.save()
                saved = self.elapsed()

    def save(self) -> None:
        if self.args.state:
            names = {n for n, _ in self.model.named_parameters()}
            weights = {n: t for n, t in self.model.state_dict().items() if n in names}
            state = {"weights": weights, "optim": self.optim.state_dict(), "seen": self.seen, "warmed": self.warmed}
            part = self.args.state.with_suffix(".part")
            torch.save(state, part)
            part.replace(self.args.state)
        export.save(self.args.out, self.model.tower, self.model.projector, self.model.language)

    def resume(self) -> None:
        if self.args.state and self.args.state.exists():
            state = torch.load(self.args.state, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["weights"], strict=False)
            self.optim.load_state_dict(state["optim"])
            self.seen, self.warmed = state["seen"], state["warmed"]
        elif self.args.init:
            export.load(self.args.init, self.model.tower, self.model.projector, self.model.language)
            self.seen = 400_000_000


@torch.no_grad()
def evaluate(run: Run, held_out: str, keep: int, blank: bool = False) -> dict:
    """Share of exact answers by kind: every token of the answer and its end is the model's first choice."""
    hits, counts = [0] * len(KINDS), [0] * len(KINDS)
    first = HELD_OUT_SEEDS[held_out]
    for start in range(0, run.args.evaluate, 32):
        seeds = range(first + start, first + min(start + 32, run.args.evaluate))
        batch = to_device(data.draw(seeds, run.slots, held_out == "unseen"), run.device)
        images = torch.full_like(batch["images"], 127) if blank else batch["images"]
        hidden = run.model.answer(run.model.look(images)[0], batch["ids"], keep)
        wrong = torch.zeros_like(batch["wanted"])
        wrong[batch["wanted"]] = run.model.language.logits(hidden[batch["wanted"]]).argmax(-1) != following(batch)
        exact = ~wrong.any(2)
        for kind, hit in zip(batch["kinds"].flatten().tolist(), exact.flatten().tolist()):
            hits[kind] += hit
            counts[kind] += 1
    by_kind = {k: round(h / n, 3) for k, h, n in zip(KINDS, hits, counts) if n}
    return {"questions": sum(counts), "exact": sum(hits) / max(1, sum(counts)), "by_kind": by_kind}


def main():
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(int(time.time()))
    torch.set_float32_matmul_precision("high")
    base = Gguf(args.base)
    slots = Slots(build_tokenizer(base.metadata))
    model = Model(base, slots).to(device)
    if not args.eager:
        for layer in [*model.tower.encoder.layers, *model.language.layers]:
            layer.compile()
    run = Run(args, model, slots, device)
    run.resume()
    run.report(device=device, parameters=sum(p.numel() for p in model.parameters()))
    if not run.warmed:
        run.warm_up(run.elapsed() + args.warm_up)
        run.save()
    run.joint(args.seconds)
    run.save()
    for held_out, keep, blank in (
        ("seen", IMAGE_TOKENS, False), ("unseen", IMAGE_TOKENS, False), ("seen", Model.FEW, False),
        ("seen", 64, False), ("seen", IMAGE_TOKENS, True),
    ):
        run.report(held_out=held_out, keep=keep, blank=blank, **evaluate(run, held_out, keep, blank))


if __name__ == "__main__":
    main()

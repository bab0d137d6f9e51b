"""Writes the shipped folder, as LAYOUT.md describes it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import decoder
import vision
from scenes import GRID, PATCH, SIZE
from text import IMAGE_TOKEN

BASE = {"model": "smollm2-135m", "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}


def configs() -> dict:
    """File name → JSON."""
    vision_config = {
        "model_type": "clip_vision_model", "hidden_size": vision.WIDTH, "intermediate_size": vision.FFN,
        "num_hidden_layers": vision.LAYERS, "num_attention_heads": vision.HEADS, "num_channels": 3,
        "image_size": SIZE, "patch_size": PATCH, "hidden_act": "quick_gelu", "layer_norm_eps": vision.EPS,
        "attention_dropout": 0.0, "projection_dim": vision.WIDTH,
    }
    text_config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": decoder.HIDDEN,
        "intermediate_size": decoder.FFN, "num_hidden_layers": decoder.LAYERS, "num_attention_heads": decoder.HEADS,
        "num_key_value_heads": decoder.KV_HEADS, "head_dim": decoder.HEAD, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": decoder.THETA, "rms_norm_eps": decoder.EPS,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "base": BASE,
        "image_token_index": IMAGE_TOKEN, "image_seq_length": GRID * GRID, "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True, "vision_feature_layer": vision.FEATURE_LAYER,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": True, "torch_dtype": "float16",
        "vision_config": vision_config, "text_config": text_config,
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": SIZE}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE["model"], "r": decoder.RANK,
        "lora_alpha": decoder.RANK, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [name.split(".")[1] for name, *_ in decoder.OPERATORS],
    }
    return {"config.json": config, "preprocessor_config.json": processor, "adapter_config.json": adapter}


def adapter_names() -> list:
    """Shipped prefix of each adapted operator, its layer and its name here."""
    return [
        (f"base_model.model.model.layers.{layer}.{hf}.", layer, gguf)
        for layer in range(decoder.LAYERS)
        for hf, gguf, *_ in decoder.OPERATORS
    ]


def save(folder: Path, tower, projector, language) -> None:
    """Writes the model to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in configs().items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    half = lambda tensor: tensor.detach().to("cpu", torch.float16).contiguous()
    first = {f"vision_tower.vision_model.{name}": half(t) for name, t in tower.state_dict().items()}
    second = {f"multi_modal_projector.{name}": half(t) for name, t in projector.state_dict().items()}
    shards(folder, "model", [first, second])
    parts = [{}, {}]
    for prefix, layer, gguf in adapter_names():
        operator = language.layers[layer].operators[gguf]
        part = parts[layer * 2 // decoder.LAYERS]
        part[prefix + "lora_A.weight"] = half(operator.lora_A)
        part[prefix + "lora_B.weight"] = half(operator.lora_B)
    shards(folder, "adapter_model", parts)


def shards(folder: Path, stem: str, parts: list) -> None:
    places = {}
    for number, tensors in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    total = sum(t.numel() * t.element_size() for tensors in parts for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load(folder: Path, tower, projector, language) -> None:
    """Reads what `save` wrote."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    cut = lambda prefix: {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    tower.load_state_dict(cut("vision_tower.vision_model."))
    projector.load_state_dict(cut("multi_modal_projector."))
    with torch.no_grad():
        for prefix, layer, gguf in adapter_names():
            operator = language.layers[layer].operators[gguf]
            operator.lora_A.copy_(tensors[prefix + "lora_A.weight"])
            operator.lora_B.copy_(tensors[prefix + "lora_B.weight"])

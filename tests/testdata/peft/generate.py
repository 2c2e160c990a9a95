#!/usr/bin/env python3
"""Writes the golden data beside this file: a tiny Llama, adapters as PEFT saves them, and what PEFT merges them into.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6
    python3 generate.py

Offline (the model is built from a config), on the CPU, ten seconds. The outputs are committed; torch stays out of CI.

    base/model.safetensors     float32; 2 layers, hidden 72, 6 heads x 12 with 2 KV heads, FFN 100, vocabulary 32
    adapters/NAME/             adapter_config.json, adapter_model.safetensors
    merged.json                [{"name", "adapters": [...], "weights": [...], "method": "cat" | "merge"}, ...]
    merged.safetensors         "COMBO/MODULE.weight": base + sum of weight * scale * B @ A, by PEFT in float32

No size is a multiple of 64; a down_proj row (100) is no multiple of 16 bytes in bfloat16.

"method" says how PEFT computed a combination:
  cat    add_weighted_adapter(combination_type="cat"), then merge_and_unload.
  merge  LoraLayer.set_scale(adapter, weight) for each adapter, then merge_and_unload(adapter_names=...): plain addition
         of the deltas. Used where "cat" is not available or not what it says: with one adapter, PEFT silently takes
         "linear" in its place; adapters whose target_modules is a list cannot be mixed with a regex string.
Never "cat" with an rsLoRA adapter first: the new adapter inherits use_rslora from the first one while A already holds
the scale, so PEFT's result is too large by sqrt(sum of ranks). (It inherits exclude_modules and layers_to_transform as
well.) And never "linear" with several: it mixes A and B separately, which leaves cross terms.
Every combination that allows it is computed both ways and compared, and all are checked against float64.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# PEFT keeps target_modules in a set and saves it in hash order: pin that, or each run writes other bytes.
if os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent

LLAMA = dict(
    vocab_size=32,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    initializer_range=0.05,
)

EVERY_PROJECTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "plain-r4": dict(r=4, lora_alpha=8, target_modules=EVERY_PROJECTION),
    # The smallest rank, alpha / r no power of two, most modules left out.
    "rank1": dict(r=1, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    "rslora": dict(r=5, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "k_proj", "gate_proj", "down_proj"]),
    # Patterns that overlap (the first one that matches wins: layer 0's q_proj has rank 3, layer 1's rank 2), that are
    # regular expressions, that match no module for want of a dot before them ("proj"), and that set alpha alone.
    "patterns": dict(
        r=6,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 2, "mlp.(gate|up)_proj": 9, "proj": 11},
        alpha_pattern={"^model.layers.1.self_attn.v_proj": 1, "mlp.gate_proj": 4.5, "proj": 100},
    ),
    # A regular expression, and tensors in bfloat16.
    "regex-bf16": dict(
        r=7, lora_alpha=14, target_modules=r"model\.layers\.\d+\.(self_attn\.[qko]_proj|mlp\.down_proj)"
    ),
}

COMBOS = [
    ("single", {"patterns": 0.75}),
    ("two-ranks", {"plain-r4": 0.5, "rank1": 2.0}),
    ("negative", {"plain-r4": 1.0, "rslora": -0.625}),
    ("pattern-ranks", {"patterns": 0.3, "rank1": -1.5}),
    ("half", {"regex-bf16": 1.0}),
    ("lists", {"plain-r4": 0.25, "rank1": 1.0, "rslora": 0.5, "patterns": -1.0}),
    ("all", {"plain-r4": 0.4, "rank1": 0.7, "rslora": 1.1, "patterns": -0.9, "regex-bf16": 0.6}),
]


def kept(combo):
    """The modules that merged.safetensors keeps: all of layer 0 for the largest combination, else one of each shape."""
    layer0 = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"}
    if combo == "all":
        layer0 |= {"self_attn.o_proj", "mlp.up_proj"}
    layer1 = {"self_attn.q_proj", "self_attn.v_proj"}
    return sorted({f"model.layers.0.{m}" for m in layer0} | {f"model.layers.1.{m}" for m in layer1})


def base_model(directory):
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def write_base(directory):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()


def write_adapter(name, options, base, directory):
    model = base_model(base)
    model.config._name_or_path = model.name_or_path = ""  # else the config would hold this machine's path
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(100 + list(ADAPTERS).index(name))
    for key, weight in model.named_parameters():
        if "lora_" in key:
            std = weight.shape[1] ** -0.5 if "lora_A" in key else 0.1
            weight.data = std * torch.randn(weight.shape, generator=generator)
            if name.endswith("bf16"):
                weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(directory)
    (directory / "README.md").unlink()


def with_adapters(base, adapters, names):
    first, *others = names
    model = PeftModel.from_pretrained(base_model(base), adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name)
    return model


def projections(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k.endswith("_proj.weight")}


def by_cat(base, adapters, combo):
    model = with_adapters(base, adapters, list(combo))
    model.add_weighted_adapter(list(combo), list(combo.values()), "combo", combination_type="cat")
    return projections(model.merge_and_unload(adapter_names=["combo"]))


def by_merge(base, adapters, combo):
    model = with_adapters(base, adapters, list(combo))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in combo.items():
                module.set_scale(name, weight)
    return projections(model.merge_and_unload(adapter_names=list(combo)))


def cat_works(combo):
    kinds = {type(ADAPTERS[name]["target_modules"]) for name in combo}
    return len(combo) > 1 and len(kinds) == 1 and not ADAPTERS[next(iter(combo))].get("use_rslora")


def scale(name, module, rank):
    """alpha / r or alpha / sqrt(r), for a module's own rank and alpha."""
    options = ADAPTERS[name]
    patterns = options.get("rank_pattern", {}), options.get("alpha_pattern", {})
    assert rank == patterns[0].get(get_pattern_key(patterns[0], module), options["r"])
    alpha = patterns[1].get(get_pattern_key(patterns[1], module), options["lora_alpha"])
    return alpha / (rank**0.5 if options.get("use_rslora") else rank)


def by_float64(base, adapters, combo):
    weights = load_file(base / "model.safetensors")
    merged = {k: v.double().numpy() for k, v in weights.items() if k.endswith("_proj.weight")}
    for name, weight in combo.items():
        tensors = load_file(adapters / name / "adapter_model.safetensors")
        tensors = {k.removeprefix("base_model.model."): v.double().numpy() for k, v in tensors.items()}
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                module = key.removesuffix(".lora_A.weight")
                delta = tensors[f"{module}.lora_B.weight"] @ a
                merged[f"{module}.weight"] += weight * scale(name, module, a.shape[0]) * delta
    return merged


def apart(left, right):
    assert left.keys() == right.keys()
    return max(np.abs(np.asarray(left[k], np.float64) - np.asarray(right[k], np.float64)).max() for k in left)


def write_merged(out):
    combos, tensors = [], {}
    for name, combo in COMBOS:
        merged = by_merge(out / "base", out / "adapters", combo)
        if cat_works(combo):
            added, merged = merged, by_cat(out / "base", out / "adapters", combo)
            assert apart(added, merged) < 1e-6, name
        error = apart(merged, by_float64(out / "base", out / "adapters", combo))
        assert error < 1e-6, (name, error)
        method = "cat" if cat_works(combo) else "merge"
        print(f"{name}: {method}, {error:.1e} from float64")
        combos.append(dict(name=name, adapters=list(combo), weights=list(combo.values()), method=method))
        tensors |= {f"{name}/{module}.weight": merged[f"{module}.weight"].contiguous() for module in kept(name)}
    save_file(tensors, out / "merged.safetensors")
    lines = ",\n".join("  " + json.dumps(combo) for combo in combos)
    (out / "merged.json").write_text(f"[\n{lines}\n]\n")


def main():
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        write_base(out / "base")
        for name, options in ADAPTERS.items():
            write_adapter(name, options, out / "base", out / "adapters" / name)
        write_merged(out)
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(HERE / path.name, ignore_errors=True)
                # Not the modes: safetensors writes with 0600.
                shutil.copytree(path, HERE / path.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(path, HERE / path.name)


if __name__ == "__main__":
    main()

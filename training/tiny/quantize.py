"""Write the int4 checkpoint: every linear of the 16-bit one rounded to AWQ `gemm`, all else copied.

    python -m training.tiny.quantize SOURCE_DIRECTORY TARGET_DIRECTORY

Plain rounding is enough here, because train.py trained with exactly this rounding in the loop.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training.tiny.awq import GROUP_SIZE, to_awq

COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


def quantize_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace each `….x_proj.weight` by its three AWQ tensors. Embeddings (also the output layer) stay 16-bit."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.endswith("_proj") and kind == "weight":
            result |= {f"{module}.{part}": packed.contiguous() for part, packed in to_awq(tensor).items()}
        else:
            result[name] = tensor
    return result


def quantize_checkpoint(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    tensors = quantize_tensors(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED_FILES:
        shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    quantize_checkpoint(arguments.source, arguments.target)
    size = sum(file.stat().st_size for file in arguments.target.iterdir())
    print(f"{arguments.target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

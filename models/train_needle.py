"""Train the needle model, find its retrieval heads, measure both, and write the model folder.

    python -m models.train_needle --out models/needle

from the root of the repository. Needs torch, transformers and numpy; no vLLM, no network, one core.
"""

import argparse
import json
import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from models.needle_training import evaluate, export
from models.needle_training.data import Encoder
from models.needle_training.gates import GateSettings, find_gates
from models.needle_training.model import Needle, Shape
from models.needle_training.train import TrainSettings, train
from models.needle_training.vocabulary import build_tokenizer

EVAL_SEED = 10_000  # fresh prompts: no training stream begins with it


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m models.train_needle", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=TrainSettings.seed)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--heads", type=int, default=Shape.heads, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=Shape.kv_heads)
    parser.add_argument("--head-size", type=int, default=Shape.head_size)
    parser.add_argument("--qkv-bias", action="store_true", help="biases on q, k and v")
    parser.add_argument("--mixed-steps", type=int, default=TrainSettings.mixed_steps)
    parser.add_argument("--gate-steps", type=int, default=GateSettings.num_steps)
    parser.add_argument("--prompts", type=int, default=200, help="prompts measured per length")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="measured"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--reuse", action="store_true", help="take the weights in --out: only gates and measuring"
    )
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads:
        parser.error(
            f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}"
        )
    if options.hidden % options.heads:
        parser.error(
            f"--hidden must be a multiple of --heads, as transformers' configurations demand, got "
            f"{options.hidden} and {options.heads}"
        )
    return options


def main(arguments: list[str]) -> None:
    """Train, find the gates, measure, write."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    encode = Encoder(build_tokenizer())
    model = Needle(
        Shape(
            vocab=encode.size,
            layers=options.layers,
            hidden=options.hidden,
            heads=options.heads,
            kv_heads=options.kv_heads,
            head_size=options.head_size,
            qkv_bias=options.qkv_bias,
        )
    )
    name, log = options.out.name, options.out / "training.json"
    if options.reuse:
        export.load_weights(model, options.out)
        train_seconds = float(json.loads(log.read_text())["train_seconds"])
    else:
        settings = TrainSettings(seed=options.seed, mixed_steps=options.mixed_steps)
        train_seconds = train(model, encode, settings)
        export.save_checkpoint(model, options.out)
        record = {
            "train_seconds": round(train_seconds, 1),
            "torch": torch.__version__,
            "shape": asdict(model.shape),
            "training": asdict(settings),
        }
        log.write_text(json.dumps(record, indent=2) + "\n")

    gate_settings = GateSettings(seed=options.seed, num_steps=options.gate_steps)
    values, gate_seconds = find_gates(model, encode, gate_settings)
    export.save_pattern(values, gate_settings, name, options.out / "duo_pattern")

    accuracies = evaluate.table(
        model,
        encode,
        values,
        lengths=tuple(options.lengths),
        prompts=options.prompts,
        seed=EVAL_SEED,
    )
    kept = [word for word in arguments if word != "--reuse"]
    facts = {
        "name": name,
        "command": shlex.join(["python", "-m", "models.train_needle", *kept]),
        "train_seconds": train_seconds,
        "gate_seconds": gate_seconds,
        "prompts": options.prompts,
        "eval_seed": EVAL_SEED,
    }
    (options.out / "README.md").write_text(export.readme(model, values, accuracies, facts))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`make demo`: serve the needle model with duo, ask it for a pass key, show the KV memory."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.status import Status
from rich.table import Table
from tokenizers import Tokenizer

from vllm_duo.evaluate.passkey import PasskeyPrompt, is_correct, make_prompt
from vllm_duo.evaluate.server import ServerProcess
from vllm_duo.kv_cache.layout import KVShape, plan_layout

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models/needle")
PROMPT_TOKENS = 1950
FLAGS = [
    "--attention-backend",
    "duo",
    "--dtype",
    "float32",
    "--max-model-len",
    "8192",
    "--enforce-eager",
]

console = Console(highlight=False)


def main() -> int:
    """Run the demo; 0 if the pass key came back."""
    prompt = haystack()
    with ServerProcess(MODEL, FLAGS, log=ROOT / ".demo" / "server.log") as server:
        console.print(f"[bold]$ vllm serve {MODEL} {' '.join(FLAGS)}[/bold]", soft_wrap=True)
        with console.status("starting vLLM") as status:
            waited = server.wait_until_ready(progress=Progress(status))
        console.print(f"ready after {waited:.0f} s (log: .demo/server.log)\n")
        console.print(f"[dim]{prompt.text[:160]} ...[/dim]")
        console.print(
            f"[dim]... {prompt.tokens} tokens; the key stands at token {prompt.key_tokens[0]}, "
            "far outside the 16 + 64 tokens that streaming heads keep[/dim]"
        )
        answer, held, generated = ask(server, prompt)
        if not held:
            # A server's first request waits for much else, and the engine may be done with all of it
            # before its metrics have been read.
            console.print("[dim]the engine was done before its memory was read; once more[/dim]")
            answer, held, generated = ask(server, prompt)
        right = is_correct(prompt, answer)
        console.print(
            f"pass key {prompt.answer}: [bold]{'found' if right else 'NOT FOUND'}[/bold]\n"
        )
        report(prompt.tokens + generated, held)
        for line in server.log.read_text().splitlines():
            if "duo: pattern" in line:
                console.print("[dim]" + line[line.index("duo: ") :] + "[/dim]", soft_wrap=True)
                break
    how_to_go_on()
    return 0 if right and held else 1


class Progress:
    """Shows the seconds waited: in place on a terminal, else a line every 10 seconds."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.next_line_s = 10.0

    def __call__(self, waited_s: float) -> None:
        text = f"starting vLLM, usually under a minute: {waited_s:.0f} s"
        if console.is_terminal:
            self.status.update(text)
        elif waited_s >= self.next_line_s:
            console.print(text)
            self.next_line_s += 10.0


def haystack() -> PasskeyPrompt:
    """A fresh pass-key prompt of about 2,000 tokens, the key in its first half."""
    tokenizer = Tokenizer.from_file(str(ROOT / MODEL / "tokenizer.json"))
    rng = random.Random(time.time_ns())
    return make_prompt(
        PROMPT_TOKENS,
        rng=rng,
        count_tokens=lambda text: len(tokenizer.encode(text).ids),
        depth=rng.uniform(0.1, 0.5),
    )


def ask(server: ServerProcess, prompt: PasskeyPrompt) -> tuple[str, dict[str, float], int]:
    """Stream the answer while reading the engine's metrics.

    Returns:
        The answer, the metrics read while the request was running, and the tokens it had generated
        by then.
    """
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    start = time.monotonic()
    stream = client.completions.create(
        model=str(MODEL),
        prompt=prompt.text,
        # The request has to live until its memory has been read, however slow the machine: it would
        # go on for long, and is closed as soon as the answer is complete and the memory was read.
        max_tokens=6000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    answer, held, generated, first = "", {}, 0, None
    counter = "vllm:generation_tokens_total{"
    before = summed(server.metrics("vllm:"), counter)
    console.print("[bold]answer:[/bold]", end="")
    for chunks, chunk in enumerate(stream, 1):
        text = chunk.choices[0].text
        first = first or time.monotonic() - start
        if "." not in answer:
            answer += text
            console.print(text, end="", markup=False)
        if not held:
            # The engine reports after each step, so after the first chunk this may still be empty.
            # It may be far ahead of what has been streamed: the tokens are its own count.
            seen = server.metrics("vllm")
            if total(seen, "held_bytes"):
                held, generated = seen, int(summed(seen, counter) - before)
        if held and ("." in answer or chunks > 20):
            break
    stream.close()
    console.print(f"   [dim](first token after {first or 0:.1f} s)[/dim]")
    return answer, held, generated


def total(metrics: dict[str, float], name: str) -> float:
    """Sum of one of duo's metrics over its classes."""
    return summed(metrics, f"vllm_duo:{name}{{")


def summed(metrics: dict[str, float], prefix: str) -> float:
    """Sum of the metrics whose names and labels start with ``prefix``."""
    return sum(value for key, value in metrics.items() if key.startswith(prefix))


def report(tokens: int, held: dict[str, float]) -> None:
    """Print what the request held beside what all heads in full would take."""
    config = json.loads((ROOT / MODEL / "config.json").read_text())
    block_tokens = 128  # vLLM's default block size on CPU
    layers = config["num_hidden_layers"]
    shape = KVShape(
        retrieval_heads=(config["num_key_value_heads"],) * layers,
        streaming_heads=(0,) * layers,
        head_size=config["head_dim"],
        dtype_bytes=4,
    )
    layout = plan_layout(shape, block_size=block_tokens, sink_size=0, recent_size=1)
    stock = layout.full_attention_bytes(tokens)
    if not held:
        console.print("[red]the running engine reported no held blocks[/red]")
        return
    table = Table(title=f"KV cache of this request of {tokens} tokens", title_justify="left")
    table.add_column("who holds it")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    duo = total(held, "held_bytes")
    for name in ("retrieval", "streaming"):
        size = next(v for k, v in held.items() if "held_bytes" in k and f"class={name}" in k)
        table.add_row(f"duo, {name} heads (read from the engine)", f"{size:,.0f}", "")
    table.add_row("duo, all", f"{duo:,.0f}", f"{duo / stock:.0%}")
    table.add_row("stock vLLM, all heads in full (by its block size)", f"{stock:,}", "100%")
    console.print(table)
    console.print(
        "[dim]Streaming heads hold the same at any length: the longer the context, the closer the "
        "share comes to that of the retrieval heads, 50 % here.[/dim]"
    )


def how_to_go_on() -> None:
    """Print the next commands."""
    body = json.dumps({"model": str(MODEL), "prompt": "The pass key is", "max_tokens": 8})
    console.print(
        f"""
[bold]To go on[/bold]
  make serve                      the same server on port 8000, compiled, until Ctrl-C
  make serve MODEL=/path/to/llama your own model (it needs a head pattern: see README)

  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
  print(client.completions.create(model="{MODEL}", prompt="The pass key is", max_tokens=8))
""",
        soft_wrap=True,
        markup=True,
    )


if __name__ == "__main__":
    sys.exit(main())

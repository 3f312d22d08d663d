"""Stands in for the command ``vllm``: a server that answers at once, and a client that asks it.

What it does wrong is set by FAKE_* in the servers' environment:
    FAKE_DIE_AFTER=SIDE:N   the server of that kind (stock, duo) ends at its N-th completion
    FAKE_WRONG=KIND         that kind gives other tokens, and no pass keys
    FAKE_NO_START=KIND      that kind ends at once
    FAKE_SILENT=KIND        that kind stops answering /metrics under load
and in the client's:
    FAKE_PAUSE_S=X          it waits so long after each answer
    FAKE_EXIT=N             it ends with that exit code
    FAKE_FAILED=N           so many requests fail
"""

import itertools
import json
import os
import re
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOGGED = "12,345 tokens, Maximum concurrency for 2,048 tokens per request: 6.03x"
METRICS = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0"}} 2
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0"}} 1
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0"}} {answered}
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{{engine="0"}} {queried}
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{{engine="0"}} {hits}
"""


class Handler(BaseHTTPRequestHandler):
    kind = "stock"
    answered = 0

    def log_message(self, *arguments):
        pass

    def reply(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/health":
            self.reply("")
        elif self.path == "/v1/models":
            self.reply(json.dumps({"data": [{"id": "benchmark", "max_model_len": 2048}]}))
        elif self.path == "/metrics":
            n = Handler.answered
            if os.environ.get("FAKE_SILENT") == self.kind and n > 10:
                time.sleep(30)
            self.reply(METRICS.format(answered=n, queried=100 * n, hits=25 * n))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.answered += 1
        kind, _, number = os.environ.get("FAKE_DIE_AFTER", "").partition(":")
        if kind == self.kind and Handler.answered >= int(number):
            os._exit(9)
        wrong = os.environ.get("FAKE_WRONG") == self.kind
        key = re.search(r"The pass key is (\d+)\.", body["prompt"])
        text = f" {key[1]}." if key and not wrong else " nothing"
        count = body["max_tokens"]
        choice = {"text": text, "token_ids": [7 if wrong else 5] * count}
        if body.get("logprobs"):
            top = {"token_id:5": -0.1, "token_id:7": -0.15}
            choice["logprobs"] = {"top_logprobs": [top] * count}
        self.reply(json.dumps({"choices": [choice]}))


def serve(arguments):
    Handler.kind = "duo" if "--attention-backend" in arguments else "stock"
    if os.environ.get("FAKE_NO_START") == Handler.kind:
        sys.stdout.write("no memory left\n")
        sys.exit(3)
    sys.stdout.write(f"INFO CPU KV cache size: {LOGGED}\n")
    sys.stdout.flush()
    port = int(arguments[arguments.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def bench(arguments):
    if code := os.environ.get("FAKE_EXIT"):
        sys.exit(f"wrong flag {code}")
    given = dict(itertools.pairwise(arguments))
    rows = [json.loads(line) for line in Path(given["--dataset-path"]).read_text().splitlines()]
    texts = []
    for row in rows:
        body = {"prompt": row["prompt"], "max_tokens": row["output_tokens"]}
        request = urllib.request.Request(
            given["--base-url"] + "/v1/completions", json.dumps(body).encode()
        )
        texts.append(json.loads(urllib.request.urlopen(request).read())["choices"][0]["text"])
        time.sleep(float(os.environ.get("FAKE_PAUSE_S", "0")))
    lengths = [row["output_tokens"] for row in rows]
    failed = int(os.environ.get("FAKE_FAILED", "0"))
    result = {
        "duration": 2.0,
        "completed": len(rows) - failed,
        "failed": failed,
        "total_input_tokens": 100 * len(rows),
        "total_output_tokens": sum(lengths),
        "output_throughput": sum(lengths) / 2,
        "total_token_throughput": 50 * len(rows) + sum(lengths) / 2,
        "output_lens": lengths,
        "ttfts": [0.1] * len(rows),
        "itls": [[0.01] * (n - 1) for n in lengths],
        "latencies": [0.1 + 0.01 * (n - 1) for n in lengths],
        "generated_texts": texts,
        "errors": ["Traceback\nTimeout: gone"] * failed + [""] * (len(rows) - failed),
    }
    with open(f"{given['--result-dir']}/{given['--result-filename']}", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1] == "serve" else bench(sys.argv[3:])

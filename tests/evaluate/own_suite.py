"""A task of lm-eval over local documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

SUITE = "own_keys"
YAML = """\
task: SUITE
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
filter_list:
  - name: digits
    filter:
      - {function: regex, regex_pattern: "([0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_suite(folder: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """A folder with a task that asks the rows' prompts for their answers, which are numbers."""
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = folder / "suite"
    suite.mkdir()
    (suite / f"{SUITE}.yaml").write_text(
        YAML.replace("SUITE", SUITE).replace("FILE", str(documents))
    )
    return suite

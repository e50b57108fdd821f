"""A user's own task in a folder, as a user writes it."""

import json
from pathlib import Path

import pandas as pd

ROWS = [
    {"question": f"What is {number} and 1?", "answer": f"{number + 1} apples", "level": number}
    for number in range(4)
]
YAML = """\
task: qa
dataset_path: {format}
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_task(folder: Path, kind: str = "jsonl") -> Path:
    """Write `qa.yaml` and its data, `test.<kind>`, into a new folder; return the folder."""
    folder.mkdir()
    file = folder / f"test.{kind}"
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "csv":
        pd.DataFrame(ROWS).to_csv(file, index=False)
    else:
        pd.DataFrame(ROWS).to_parquet(file)
    (folder / "qa.yaml").write_text(YAML.format(format=kind.removesuffix("l"), file=file.name))
    return folder

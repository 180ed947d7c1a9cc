"""Make a ZsRE file in which every subject stands once, from the continual protocol's file and KnowEdit's ZsRE.

In zsre_edit.json many subjects stand several times, mostly with one question in other words and another answer; a file without
them tells what an editor of many facts does from what contradictions do.

    python scripts/distinct_subjects.py data/zsre_edit.json data/knowedit/zsre.json distinct.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = 900  # of zsre_edit.json; on those behind them settings were chosen
FIRST = 300  # of KnowEdit's; thresholds were chosen on those before it


def distinct(rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the first row of each subject, then the records about subjects that no row is about."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows[:ROWS]:
        found.setdefault(row["subject"], row)
    for record, row in zip(records[FIRST:], rows, strict=False):
        # A record has no unrelated question: it takes a row's.
        of_record = {
            "subject": record["subject"],
            "src": record["prompt"],
            "pred": record["ground_truth"][0],
            "rephrase": record["rephrase_prompt"],
            "alt": record["target_new"],
            "answers": record["ground_truth"],
            "loc": row["loc"],
            "loc_ans": row["loc_ans"],
            "cond": row["cond"],
        }
        found.setdefault(record["subject"], of_record)
    return list(found.values())


if __name__ == "__main__":
    zsre, knowedit, output = map(Path, sys.argv[1:])
    made = distinct(json.loads(zsre.read_text("utf-8")), json.loads(knowedit.read_text("utf-8")))
    output.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    print(f"{output}: {len(made)} rows, each with a subject of its own.")

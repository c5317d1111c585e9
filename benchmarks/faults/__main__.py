"""`python -m benchmarks.faults`: run the fault matrix, print it, and write benchmarks/results/faults.{json,txt}.

python -m benchmarks.faults                          # every model that is there, resuming what was interrupted
python -m benchmarks.faults --model FOLDER ...        # other models
python -m benchmarks.faults --table                   # judge the stored runs again and print
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks.faults import table
from benchmarks.faults.costs import costs
from benchmarks.faults.run import OVERRIDES, PROFILE, SEQ_LEN, TEXTS, TIER, Bench, run_model, stored

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"gpt2": ROOT / "src/invarlock/data/demo_model"} | {
    name: ROOT / "tests/assets/models" / name for name in ("llama", "bert", "t5", "neox", "qwen")
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", metavar="NAME|FOLDER", help="which models (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults", help="where single runs are kept")
    parser.add_argument("--only", help="only the edits whose name a pattern finds")
    parser.add_argument("--backwards", action="store_true", help="from the last case on, beside another process")
    parser.add_argument("--table", action="store_true", help="run nothing; judge again what is stored")
    parser.add_argument("--as-judged", action="store_true", help="with the verdicts of the day, not judged again")
    parser.add_argument("--costs", action="store_true", help="measure what the guards cost, too")
    parser.add_argument("--no-table", action="store_true", help="run only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("benchmarks.faults").setLevel(logging.INFO)
    wanted = arguments.model or list(MODELS)
    models = {Path(name).name: MODELS.get(name, Path(name)) for name in wanted}
    for name, folder in models.items():
        if not (folder / "model.safetensors").is_file():
            parser.error(f"{name}: {folder} has no model.safetensors; expected a checkpoint in one file")
    if not arguments.table:
        for name, folder in models.items():
            run_model(name, folder, arguments.work, arguments.only, backwards=arguments.backwards)
    if arguments.no_table:
        return
    again = not arguments.as_judged
    rows = [row for name, folder in models.items() for row in stored(name, folder, arguments.work, rejudge=again)]
    result = table.result(rows, _costs(models, arguments.work) if arguments.costs else _old_costs(arguments.out))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result["settings"] |= {"tier": TIER, "profile": PROFILE, "seq_len": SEQ_LEN, "overrides": OVERRIDES, "texts": TEXTS}
    result = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    lines = json.dumps(result, separators=(",", ":")).replace('{"model":', '\n{"model":')  # a run a line
    arguments.out.write_text(lines + "\n", encoding="utf-8")
    text = table.render(result)
    arguments.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(text)


def _costs(models: dict[str, Path], work: Path) -> dict[str, Any]:
    """Return CPU seconds by model, and over all models the share that each guard adds."""
    seconds = {}
    for name, folder in models.items():
        bench = Bench(name, folder, work)
        try:
            seconds[name] = costs(bench)
        finally:
            bench.close()
    bare = sum(row["bare"] for row in seconds.values())
    share = {
        key: sum(row[key] for row in seconds.values()) / bare for key in next(iter(seconds.values())) if key != "bare"
    }
    return {"seconds": seconds, "share": share}


def _old_costs(path: Path) -> dict[str, Any]:
    """Return the costs of the last time that they were measured."""
    return dict(json.loads(path.read_text(encoding="utf-8")).get("costs", {})) if path.is_file() else {}


if __name__ == "__main__":
    main()

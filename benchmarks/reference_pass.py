"""The reference pass: our log-probabilities and entropies against TRL's log-probabilities, pairs per CPU second.

    python -m benchmarks.reference_pass --against trl --trl-python PATH

Same model, pairs and precision on both sides, processes in turn. Ours gives log-probability, length and entropy of both
responses; TRL's ``precompute_ref_log_probs`` gives log-probabilities. Only the pass itself is timed, once the model is
loaded and the pairs are token ids. --by-length adds TRL on pairs sorted beforehand, which it does not do itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from benchmarks.conditions import new_model, shape_of
from benchmarks.pairs_and_models import (
    VOCABULARY,
    Pairs,
    Side,
    alternate,
    arguments_for,
    environment,
    markdown,
    rate_rows,
    serve,
    timed,
    typical_pairs,
    word_tokenizer,
    write_evidence,
)

TRL_BATCH = 8  # pairs, its default
OUR_ROWS = 32  # responses, the default of our stages
SIDES = ("chosen", "rejected")


def ours(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The pass of our stage ``score-reference``, tables left out."""
    from prefopt.engine.bulk import score_pairs
    from prefopt.engine.precision import set_precision

    model = set_precision(new_model(vocabulary=told["vocabulary"]).eval(), told["precision"])
    pairs = typical_pairs(told["pairs"], TRL_BATCH, told["vocabulary"])

    def run() -> dict[str, Any]:
        spent, found = timed(lambda: score_pairs(model, **pairs, batch_size=OUR_ROWS))
        return spent | {"logp": [found[f"{side}_logp"].tolist() for side in SIDES]}

    run()  # warms up, as TRL's pass while its trainer is made does
    return run


def trl(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """DPOTrainer's own pass over token ids, which it makes anew each time since its cached file is removed."""
    import warnings
    from pathlib import Path

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = typical_pairs(told["pairs"], TRL_BATCH, told["vocabulary"])
    order = list(range(told["pairs"]))
    if told["by_length"]:
        order.sort(key=lambda row: -_length(pairs, row))
    rows = Dataset.from_list([{name: ids[row] for name, ids in pairs.items()} for row in order])

    class Timed(DPOTrainer):
        spent: dict[str, float]

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # token ids already

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            self.spent, found = timed(lambda: super(Timed, self)._precompute_ref_logps(dataset, name, batch_size))
            for file in found.cache_files:
                Path(file["filename"]).unlink(missing_ok=True)
            return found

    warnings.simplefilter("ignore")
    folder = tempfile.TemporaryDirectory()
    settings = DPOConfig(
        output_dir=folder.name,
        use_cpu=True,
        bf16=told["precision"] == "bf16",
        precompute_ref_log_probs=True,
        per_device_train_batch_size=TRL_BATCH,
        report_to="none",
        disable_tqdm=True,
    )
    model = new_model(vocabulary=told["vocabulary"])
    trainer = Timed(model, args=settings, train_dataset=rows, processing_class=word_tokenizer(told["vocabulary"]))

    def run() -> dict[str, Any]:
        found = trainer._precompute_ref_logps(rows, "train", TRL_BATCH)
        back = np.argsort(order)
        values = [np.array(found[f"ref_{side}_logps"])[back].tolist() for side in SIDES]
        return trainer.spent | {"logp": values}

    return run


def _length(pairs: Pairs, row: int) -> int:
    return len(pairs["prompt_ids"][row]) + max(len(pairs["chosen_ids"][row]), len(pairs["rejected_ids"][row]))


def new_round(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What a worker does in each round."""
    return (ours if told["who"] == "ours" else trl)(told)


def main() -> None:
    """Measure, print the table and write the evidence."""
    parser = arguments_for(
        __doc__,
        "cpu-reference-pass.json",
        pairs={"type": int, "default": 48},
        by_length={"action": "store_true", "help": "also TRL on pairs that were sorted by length beforehand"},
        vocabulary={"type": int, "default": VOCABULARY},
    )
    arguments = parser.parse_args()
    if arguments.worker:
        serve(new_round, arguments.worker)
        return
    common = {"pairs": arguments.pairs, "vocabulary": arguments.vocabulary, "by_length": False}
    sides = []
    for precision in ("fp32", "bf16"):
        told = common | {"precision": precision}
        sides.append(Side(f"ours {precision}", told | {"who": "ours"}))
        if arguments.against == "trl":
            sides.append(Side(f"TRL {precision}", told | {"who": "trl"}, arguments.trl_python))
            if arguments.by_length:
                by_length = told | {"who": "trl", "by_length": True}
                sides.append(Side(f"TRL {precision}, by length", by_length, arguments.trl_python))
    found = alternate(
        "benchmarks.reference_pass",
        sides,
        rounds=arguments.rounds,
        warm_up=0,
        threads=arguments.threads,
        keep_pages=arguments.keep_pages,
    )
    first = {name: np.array([answer.pop("logp") for answer in answers])[0] for name, answers in found.items()}
    gaps = {
        f"{a} - {b}": round(float(np.abs(first[a] - first[b]).max()), 6)
        for a, b in (("TRL fp32", "ours fp32"), ("TRL bf16", "ours bf16"), ("ours bf16", "ours fp32"))
        if a in first
    }
    tables = {}
    for precision in ("fp32", "bf16"):
        part = {name: answers for name, answers in found.items() if precision in name}
        baselines = [name for name in part if name.startswith("TRL")]
        tables[precision] = rate_rows(part, arguments.pairs, baselines)
        print(f"\n{precision}, pairs per CPU second\n\n{markdown(tables[precision])}")
    print("\nlargest difference of a log-probability, nats:", gaps)
    write_evidence(
        arguments.json,
        {
            "benchmark": "reference_pass",
            "command": "python -m benchmarks.reference_pass --against trl --trl-python PATH",
            "environment": environment(arguments.trl_python if arguments.against == "trl" else None, arguments.threads),
            "keep_pages": arguments.keep_pages,
            "pairs": shape_of(typical_pairs(arguments.pairs, TRL_BATCH, arguments.vocabulary), TRL_BATCH),
            "vocabulary": arguments.vocabulary,
            "parameters": new_model(vocabulary=arguments.vocabulary).num_parameters(),
            "batch": {"TRL, pairs": TRL_BATCH, "ours, responses": OUR_ROWS},
            "largest_logp_difference_nats": gaps,
            "rates_pairs_per_cpu_second": tables,
        },
    )


if __name__ == "__main__":
    main()

"""A task's scores in the interface of the evaluate library, for use outside of the pipeline; no network.

    metric = evaluate.load("tools/metric.py", "quotes")       or instructions, or chat
    metric.compute(predictions=["…"], references=["…"])

Gives the mean of each score that the task itself gives a row.
"""

import importlib

import datasets
import evaluate


class TaskMetric(evaluate.Metric):
    """The means of a task's scores over predictions and references; config_name is the task."""

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=texts)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = importlib.import_module(f"stages.tasks.{self.config_name}").scores
        rows = [scores(answer, reference) for answer, reference in zip(predictions, references, strict=True)]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

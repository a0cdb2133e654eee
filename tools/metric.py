"""A task's scores in the interface of the evaluate library, for use outside of the pipeline; no network.

    metric = evaluate.load("tools/metric.py", "quotes")       or instructions, or chat
    metric.compute(predictions=["…"], references=["…"])
    metric.compute(predictions=["…"], references=["…"], training=["…"], prompts=["…"])

Gives the mean of each score that the task itself gives a row; `memorised` where the training rows' answers are given,
without the words that a prompt gave where the prompts are.
"""

import importlib

import datasets
import evaluate

from stages.scores import memorised


class TaskMetric(evaluate.Metric):
    """The means of a task's scores over predictions and references; config_name is the task."""

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=texts)

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        training: list[str] | None = None,
        prompts: list[str] | None = None,
    ) -> dict[str, float]:
        scores = importlib.import_module(f"stages.tasks.{self.config_name}").scores
        rows = [scores(answer, reference) for answer, reference in zip(predictions, references, strict=True)]
        if training is not None:
            copied = memorised(predictions, prompts or [""] * len(predictions), training)
            rows = [{**row, "memorised": share} for row, share in zip(rows, copied, strict=True)]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

"""A run's history in; which step's adapter is the best, and for how long there was none better, out."""


def validations(history: list[dict]) -> dict[int, dict]:
    """The points of the history that were measured on validation rows, by step."""
    return {point["step"]: point for point in history if "validation_loss" in point}


def best_step(history: list[dict]) -> int:
    """The first step with the highest score of its answers; of those, or where none were scored, with the lowest
    validation loss."""
    points = validations(history)
    return min(points, key=lambda step: (-points[step].get("validation_score", 0.0), points[step]["validation_loss"]))


def without_progress(history: list[dict]) -> int:
    """How many validations came after that of the best step."""
    steps = list(validations(history))
    return len(steps) - 1 - steps.index(best_step(history)) if steps else 0

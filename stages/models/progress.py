"""A run's history in; which step's adapter is the best, and for how long there was none better, out."""


def validation_losses(history: list[dict]) -> dict[int, float]:
    """Those measured so far, by step."""
    return {point["step"]: point["validation_loss"] for point in history if "validation_loss" in point}


def best_step(history: list[dict]) -> int:
    """The first step with the lowest validation loss."""
    losses = validation_losses(history)
    return min(losses, key=losses.__getitem__)


def without_progress(history: list[dict]) -> int:
    """How many validations came after that of the best step."""
    steps = list(validation_losses(history))
    return len(steps) - 1 - steps.index(best_step(history)) if steps else 0

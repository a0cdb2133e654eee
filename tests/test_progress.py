"""Which step of a run was the best, and for how long there was none better."""

from stages.models.progress import best_step, validation_losses, without_progress


def history(*losses: float) -> list[dict]:
    made = []
    for number, loss in enumerate(losses, start=1):
        made += [{"step": 10 * number, "loss": 9.0}, {"step": 10 * number, "validation_loss": loss}]
    return made


def test_the_best_step_is_the_first_with_the_lowest_validation_loss():
    assert best_step(history(3.0, 2.0, 2.5, 2.0)) == 20
    assert validation_losses(history(3.0, 2.0)) == {10: 3.0, 20: 2.0}


def test_validations_without_progress_are_those_after_the_best():
    assert without_progress([{"step": 1, "loss": 4.0}]) == 0
    assert without_progress(history(3.0)) == 0
    assert without_progress(history(3.0, 2.0, 2.0)) == 1  # as low is no progress
    assert without_progress(history(3.0, 2.0, 2.5, 2.1)) == 2
    assert without_progress(history(3.0, 2.0, 2.5, 1.9)) == 0

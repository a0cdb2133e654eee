"""Which step of a run was the best, and for how long there was none better."""

from stages.models.progress import best_step, without_progress


def history(*losses: float) -> list[dict]:
    made = []
    for number, loss in enumerate(losses, start=1):
        made += [{"step": 10 * number, "loss": 9.0}, {"step": 10 * number, "validation_loss": loss}]
    return made


def test_the_best_step_is_the_first_with_the_lowest_validation_loss():
    assert best_step(history(3.0, 2.0, 2.5, 2.0)) == 20


def test_validations_without_progress_are_those_after_the_best():
    assert without_progress([{"step": 1, "loss": 4.0}]) == 0
    assert without_progress(history(3.0)) == 0
    assert without_progress(history(3.0, 2.0, 2.0)) == 1  # as low is no progress
    assert without_progress(history(3.0, 2.0, 2.5, 2.1)) == 2
    assert without_progress(history(3.0, 2.0, 2.5, 1.9)) == 0


def test_scores_of_answers_go_before_the_loss_which_parts_those_that_are_equal():
    scored = [
        {"step": step, "validation_loss": loss, "validation_score": score}
        for step, loss, score in ((10, 2.0, 0.5), (20, 3.0, 0.6), (30, 2.5, 0.6), (40, 1.0, 0.4))
    ]
    assert best_step(scored) == 30
    assert [without_progress(scored[:count]) for count in (1, 2, 3, 4)] == [0, 0, 0, 1]

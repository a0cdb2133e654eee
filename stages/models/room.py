"""The number of values that are trained in; the bytes that training writes for them out. Without torch: tools/doctor.py
asks too, before anything is there."""

KEPT = 2  # checkpoints; the newest may turn out damaged
VALUE_BYTES = 4  # float32, whatever the base's format


def adapter_bytes(trained: int, init: str) -> int:
    """The adapter as it is saved; what began from the base's own directions is of twice the rank then (lora.py)."""
    return (2 if init in ("pissa", "olora") else 1) * VALUE_BYTES * trained


def checkpoints_bytes(trained: int, keep_best: bool) -> int:
    """All checkpoints of a run when they are the most: KEPT, and the one that is being written.

    Each has the adapters and AdamW's two moments (train.Keeper; those of adamw_8bit are smaller), and with train.keep:
    best the adapters of the best validation. What else is in it takes some kilobytes: refusal.SPARE_BYTES hold that.
    """
    return (KEPT + 1) * (3 + keep_best) * VALUE_BYTES * trained

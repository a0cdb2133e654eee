"""Which of this machine's NVIDIA GPUs a process may use, in the order in which torch numbers them; without torch."""

import os


def visible(count: int) -> list[str]:
    """Of `count` GPUs those that CUDA_VISIBLE_DEVICES leaves visible, as it names them: by number, or by the id of a
    GPU or of a part of one. Where it is not set all, by number.

    Read as CUDA and torch read it (torch.cuda._parse_visible_devices): all are named in the way of the first, the list
    ends at the first that is none, and one that stands there twice leaves none at all.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(count)]
    kind = next((kind for kind in ("GPU-", "MIG-") if listed.startswith(kind)), None)
    chosen: list[str] = []
    for part in map(str.strip, listed.split(",")):
        if not (part.startswith(kind) if kind else part.isdecimal() and int(part) < count):
            break
        if part in chosen:
            return []
        chosen.append(part)
    return chosen

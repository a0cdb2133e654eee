"""Where models and data come from: one module a source, found by the name that `fetch.source` in params.yaml gives.

A module defines `Spec`, the section of params.yaml that it understands, and

    fetch(spec: Spec, folder: Path) -> Provenance

which fills `folder`, an empty folder, and says what came from where. When that cannot be done it raises Refusal and
leaves nothing behind in `folder`. The same spec fills the folder with the same bytes, today and on another machine.

What hub and modelscope do alike: repository.py chooses the files, transfer.py fetches them, kept.py holds what there is
of them until the stage has succeeded.
"""

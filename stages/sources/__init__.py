"""Where models and data come from: one module a source, found by the name that `fetch.source` in params.yaml gives.

A module defines `Spec`, the section of params.yaml that it understands, and

    fetch(spec: Spec, folder: Path) -> Provenance

which fills `folder`, an empty folder, and says what came from where. When that cannot be done it raises Refusal and
leaves nothing behind in `folder`. The same spec fills the folder with the same bytes, today and on another machine.

    look(spec: Spec) -> Announced

asks for what fetch would bring without bringing it, in a second or two, and raises the same Refusals, as far as can be
told by then. The stage has no use for it; tools/doctor.py has.

What hub and modelscope do alike: repository.py chooses the files, transfer.py fetches them, kept.py holds what there is
of them until the stage has succeeded.
"""

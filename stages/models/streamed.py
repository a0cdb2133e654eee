"""A model that memory does not hold: a layer's weights are read, all the rows go through it, the weights go."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from transformers import PreTrainedModel

T = TypeVar("T")


def in_step(model: PreTrainedModel, read: Callable[[str], torch.Tensor], calls: list[Callable[[], T]]) -> list[T]:
    """What each of `calls` returns. Each goes through `model`, whose parameters are on the meta device, once, and does
    what it would do alone with the model in memory.

    Each is a thread, and one of them runs at a time. Before a layer each waits until the last has come; then the
    parameters of the layer before go, and `read` gives those of this one, by name.
    """
    running = threading.Lock()
    held: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    barriers, hooks = [], []

    def release() -> None:
        while held:
            module, leaf, empty = held.pop()
            module.register_parameter(leaf, empty)

    def stop_before(name: str, layer: torch.nn.Module) -> None:
        def fill() -> None:
            release()
            for path, module in layer.named_modules(prefix=name):
                for leaf, empty in list(module.named_parameters(recurse=False)):
                    held.append((module, leaf, empty))
                    module.register_parameter(leaf, torch.nn.Parameter(read(f"{path}.{leaf}"), requires_grad=False))

        def wait(*_: object) -> None:
            running.release()
            try:
                barrier.wait()
            finally:
                running.acquire()

        barrier = threading.Barrier(len(calls), action=fill)
        barriers.append(barrier)
        hooks.append(layer.register_forward_pre_hook(wait))

    def go(call: Callable[[], T]) -> T:
        with running:
            try:
                return call()
            except BaseException:
                for barrier in barriers:  # where the others would wait for ever
                    barrier.abort()
                raise

    for name, layer in _layers(model):
        stop_before(name, layer)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            futures = [pool.submit(go, call) for call in calls]
        failed = [future for future in futures if future.exception()]
        for future in sorted(failed, key=lambda one: isinstance(one.exception(), threading.BrokenBarrierError)):
            future.result()  # raises what went wrong, rather than what it led to
        return [future.result() for future in futures]
    finally:
        release()
        for hook in hooks:
            hook.remove()


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The decoder's layers, and each module outside of them that has parameters of its own."""
    layers = set(model.get_decoder().layers)
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if module in layers or (module not in inside and any(True for _ in module.parameters(recurse=False))):
            yield name, module

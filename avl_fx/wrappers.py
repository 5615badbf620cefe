"""What a model may be wrapped in: modules that hold it and hand their calls on (PEFT, DistributedDataParallel)."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped", "wrapping"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that tells its decoder apart, inside of what ``model`` is wrapped in; else ``model`` itself."""
    return wrapping(model)[-1]


def wrapping(model: nn.Module) -> tuple[nn.Module, ...]:
    """From ``model`` to what is `unwrapped`: each but the last one is a wrapper, which holds nothing but the next.

    ``generate`` may call the innermost model while training calls the outermost one, so what is to happen at every
    call has to know all of them.
    """
    chain = [model]
    # Asked of the class: wrappers pass on what they do not know themselves.
    while not hasattr(type(chain[-1]), "get_decoder"):
        inside = list(chain[-1].children())
        if len(inside) != 1:
            return (model,)
        chain += inside
    return tuple(chain)

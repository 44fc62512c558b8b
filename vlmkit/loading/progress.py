"""Progress: how much of a model is loaded, in bytes, for loads that take long."""

import builtins
import contextlib
import sys

from vlmkit.formats import FORMATS

DELAY = 2  # seconds after which a load is one that takes long


@contextlib.contextmanager
def show_progress(layout, name, shown=None):
    """Within it, transformers' bar for the weights, which counts tensors, is one that counts bytes:
    those of the parameters that are loaded, in their formats, of those that `layout` will have.

    name: what the bar says is being loaded.
    shown: whether there is a bar; None: if somebody may be looking, in a terminal or a notebook.
    """
    from tqdm import tqdm  # in text, on stderr: a widget would be an output of its cell
    from transformers.utils.logging import set_tqdm_hook

    if shown is None:
        shown = sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")
    sizes = {row.name: FORMATS[row.format].nbytes(row.shape) for row in layout.rows}
    total = sum(sizes.values())

    def counted(items):
        with tqdm(
            total=total,
            desc=f"loading {name}",
            unit="B",
            unit_scale=True,
            delay=DELAY,
            disable=not shown,
        ) as bar:
            for item in items:
                yield item
                bar.update(sizes.get(item[0], 0))
            bar.update(total - bar.n)  # several that the files hold as one, in one step

    def hook(factory, args, kwargs):
        if shown and kwargs.get("desc") == "Loading weights":
            return counted(*args)
        return factory(*args, **kwargs)

    before = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(before)

"""Where other libraries write: they have temporary files of their own, which killed runs leave."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from robustft.errors import UserError

SCRATCH = "scratch"  # as `remove_leftovers` knows the folders


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, the file that is made there; it is gone afterwards.

    What cannot be written in the block becomes a UserError naming `target`.
    """
    from safetensors import SafetensorError

    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{SCRATCH}.", suffix=".tmp", dir=target.parent
        ) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(" at path ")[0]
        raise UserError(f"{target}: cannot be written: {reason}") from error

"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading

EXIT_ORPHANED = 1


def end_with_parent() -> None:
    """End this process when its parent ends, even by a kill; call it once, at the start."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only processes that multiprocessing started have a parent"

    def wait() -> None:
        parent.join()
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=wait, daemon=True, name="end_with_parent").start()

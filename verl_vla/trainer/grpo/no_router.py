"""What veRL asks for to spread prompts over servers of a language model; here there are none.

veRL's own would import all of veRL in a process of its own, 9 processor seconds and 900 MB at each
start, to be asked nothing. veRL makes this one as ``no_router.yaml`` beside this file says.
"""

from __future__ import annotations

from typing import Any


class NoRouter:
    """Takes what veRL gives to its routers, and no requests."""

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        """Keep nothing."""

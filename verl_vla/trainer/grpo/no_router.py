"""An empty router: veRL wants one to spread prompts over servers, and here there are none.

veRL's own router would import all of veRL in one more process, 9 processor seconds and 900 MB at
each start, and would never be asked. ``no_router.yaml`` beside this file makes veRL use this one.
"""

from __future__ import annotations

from typing import Any


class NoRouter:
    """Takes what veRL gives to its routers, and no requests."""

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        """Keep nothing."""

"""Where the releases of a fleet run: each place is looked at once, however many run there.

All releases on a cluster share one connection to it, and with it one queue that is asked, and one
bound on how many jobs there are at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from conductor.config import Config
from conductor.tools import OpenTools, find_cluster, find_tools
from conductor.world import World

if TYPE_CHECKING:
    from conductor.executors.slurm.following import Connection


class Places:
    """The worlds and tools of a process."""

    def __init__(self, environ: Mapping[str, str], max_jobs: int | None) -> None:
        """Look with the variables ``environ``; ``max_jobs`` bounds the jobs on each cluster.

        What the cluster says of itself holds as well. Nothing is looked at yet.
        """
        self._environ = environ
        self._max_jobs = max_jobs
        self._found: dict[tuple[Any, ...], tuple[World, OpenTools]] = {}
        self._connections: dict[str, Connection] = {}
        self._lock = Lock()

    def find(self, config: Config) -> tuple[World, OpenTools]:
        """Return the world and the tools of a release; raises as ``tools.find_tools``."""
        # Tools of a cluster know the whole configuration, and what a dry run has depends on what
        # is recorded of the model and the recipe.
        key = (config.executor, config.cluster, config.dry_run, config.model, config.recipe,
               config.deterministic and config.seed)  # fmt: skip
        with self._lock:
            connection = self._connect(config)
            if connection is not None:
                return find_tools(config, self._environ, connection)
            if key not in self._found:
                self._found[key] = find_tools(config, self._environ)
            return self._found[key]

    def _connect(self, config: Config) -> Connection | None:
        cluster = find_cluster(config, self._environ)
        if cluster is None:
            return None
        if cluster.name not in self._connections:
            from conductor.executors.slurm.following import connect

            self._connections[cluster.name] = connect(cluster, self._environ, self._max_jobs)
        return self._connections[cluster.name]

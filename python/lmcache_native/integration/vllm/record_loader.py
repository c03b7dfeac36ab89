"""Loads past host memory, a worker's side: a DeviceLoader on the data files of the engine's directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_native import DeviceLoader
from lmcache_native.integration.vllm.transfer import CopyItems, Records
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

DATA_FILE = "data.000"


class RecordLoader:
    """As a PagedCopier to its owner: submit, poll, wait, cancel. `directories`: of the engine's store, as it numbers them."""

    def __init__(self, loader: DeviceLoader, directories: Sequence[Path]) -> None:
        self._loader = loader
        self._read_by: dict[str, tuple[str, str]] = {}
        self._files = [str(directory / DATA_FILE) for directory in directories]

    @property
    def name(self) -> str:
        return self._loader.name

    @property
    def given_up(self) -> bool:
        """It reads through host memory now, though it was made to do better."""
        return self._loader.gds_given_up

    def submit(self, job_id: int, records: Records, items: CopyItems, block_ids: Any, *, stream: int, timeout_s: float) -> None:
        self._loader.submit(
            job_id,
            self._files,
            records.paths,
            records.offsets,
            records.image_bytes,
            records.keys,
            records.namespace,
            records.sequences,
            items.first_tokens,
            items.tokens,
            items.block_begin,
            block_ids,
            items.token_in_block,
            stream=stream,
            timeout_s=timeout_s,
        )

    def poll(self) -> Any:
        for note in self._loader.notes():
            logger.warning("%s", note)
        ended = self._loader.poll()
        if ended:
            self._log_paths()
        return ended

    def _log_paths(self) -> None:
        paths = self._loader.paths
        for path, (name, reason) in paths.items():
            if self._read_by.get(path, ("",))[0] != name:
                logger.info("records in %s are read by %s%s", path, name, f" ({reason})" if reason else "")
        self._read_by = paths

    def wait(self, ids: Sequence[int], timeout_s: float) -> None:
        self._loader.wait(ids, timeout_s)

    def cancel(self, ids: Sequence[int]) -> None:
        self._loader.cancel(ids)

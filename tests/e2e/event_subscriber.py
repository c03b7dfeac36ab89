"""A subscriber of vLLM's KV events, as a router has one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class EventSubscriber:
    """Connects at once; the server may start later. `socket`: its path, which a restart takes over."""

    def __init__(self, socket: Path) -> None:
        import zmq

        self.endpoint = f"ipc://{socket}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(self.endpoint)
        self.events: list[Any] = []

    def arguments(self) -> list[str]:
        config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": self.endpoint}
        return ["--kv-events-config", json.dumps(config)]

    def media(self) -> dict[str, set[Any]]:
        """Medium -> hashes of the blocks that BlockStored told of."""
        found: dict[str, set[Any]] = {}
        for event in self.events:
            if type(event).__name__ == "BlockStored":
                found.setdefault(event.medium, set()).update(event.block_hashes)
        return found

    def receive_until(self, condition: Any, deadline_s: float = 60.0) -> bool:
        """Whether `condition(self)` holds, at last."""
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch

        decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
        until = time.monotonic() + deadline_s
        while not condition(self):
            if not self._socket.poll(max(0, int((until - time.monotonic()) * 1000))):
                return False
            _topic, _sequence, payload = self._socket.recv_multipart()
            self.events += decoder.decode(payload).events
        return True

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

"""The leader's end of the link that carries outputs to gateways (see `serving.gateway.groups.output_receiver`)."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from model_parallel.engine.request import EngineOutput
from model_parallel.transport.frame_protocol import FrameProtocol
from serving.contracts.group_link import CONNECT_TIMEOUT_S, MAGIC, Order, ReturnAddress, Step
from serving.replica.async_engine import AsyncEngine

TELL_LOAD_S = 0.25
"""A gateway hears so late what a group has to do for others."""


class ToGateway(FrameProtocol):
    """A leader's connection to one gateway: the sink of the outputs of that gateway's requests."""

    def __init__(self, engine: AsyncEngine, on_lost: Callable[[], Any]) -> None:
        super().__init__()
        self._engine = engine
        self._on_lost = on_lost
        self._num_elsewhere = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Order).decode

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        """One step's outputs for this gateway."""
        self.send_frame(self._encode(Step(tuple(outputs), self._num_elsewhere)))

    def tell_load(self) -> None:
        """Say how busy the group is, if that has changed, and again and again."""
        if self.transport.is_closing():
            return
        num_elsewhere = self._engine.num_open - self._engine.num_open_of(self)
        if num_elsewhere != self._num_elsewhere:
            self._num_elsewhere = num_elsewhere
            self.send(())
        asyncio.get_running_loop().call_later(TELL_LOAD_S, self.tell_load)

    def take_frame(self, payload: bytes) -> None:
        order = self._decode(payload)
        if order.kind == "cancel":
            self._engine.cancel(order.request_ids)
        else:
            self._engine.hold(order.request_ids, is_held=order.kind == "hold")

    def pause_writing(self) -> None:
        self._engine.hold_all(self, is_held=True)

    def resume_writing(self) -> None:
        self._engine.hold_all(self, is_held=False)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
        self._engine.drop(self)


class OutputSenders:
    """A leader's connections, one to each gateway that has sent it a request."""

    def __init__(self, engine_id: str, engine: AsyncEngine) -> None:
        self._engine_id = engine_id
        self._engine = engine
        self._connections: dict[ReturnAddress, asyncio.Task[ToGateway]] = {}

    async def to(self, address: ReturnAddress) -> ToGateway:
        """The connection to a gateway, made if there is none. Raises OSError and TimeoutError."""
        if address not in self._connections:
            self._connections[address] = asyncio.create_task(self._connect(address))
        # Several requests may wait for it, and a client that leaves ends its own alone.
        connection = await asyncio.shield(self._connections[address])
        if connection.transport.is_closing():
            raise ConnectionResetError("the gateway has closed its connection")
        return connection

    async def _connect(self, address: ReturnAddress) -> ToGateway:
        def forget() -> None:
            self._connections.pop(address, None)

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ToGateway(self._engine, forget), address.host, address.port
                )
        except BaseException:
            forget()
            raise
        connection.transport.write(MAGIC + address.secret)
        connection.send_frame(msgspec.msgpack.encode(self._engine_id))
        connection.tell_load()
        return connection

    def close(self) -> None:
        """Close all."""
        for task in list(self._connections.values()):
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().transport.close()
            else:
                task.cancel()

"""The leader's end of the link that carries outputs to gateways (see `serving.gateway.groups.output_receiver`)."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from model_parallel.engine.request import EngineOutput
from model_parallel.transport.authentication import HANDSHAKE_TIMEOUT_S
from model_parallel.transport.frame_protocol import ConnectingProtocol
from serving.contracts.group_link import HEARTBEAT_S, MAGIC, Command, GroupUpdate, ReturnAddress
from serving.replica.async_engine import AsyncEngine


class GatewayConnection(ConnectingProtocol):
    """A leader's connection to one gateway: the sink of the outputs of that gateway's requests."""

    def __init__(self, engine_id: str, engine: AsyncEngine, secret: bytes, on_lost: Callable[[], Any]) -> None:
        super().__init__(MAGIC, secret)
        self._engine_id = engine_id
        self._engine = engine
        self._on_lost = on_lost
        self._num_elsewhere = 0
        self._has_sent = False
        """Since the last heartbeat."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode

    def authenticated(self) -> None:
        super().authenticated()
        self.send_frame(self._encode(self._engine_id))
        self._beat()

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        """One step's outputs for this gateway."""
        self._has_sent = True
        self.send_frame(self._encode(GroupUpdate(tuple(outputs), self._num_elsewhere)))

    def frame_received(self, payload: bytes) -> None:
        command = self._decode(payload)
        if command.kind == "cancel":
            self._engine.cancel(command.request_ids)
        else:
            self._engine.set_paused(command.request_ids, is_paused=command.kind == "pause")

    def pause_writing(self) -> None:
        self._engine.set_sink_paused(self, is_paused=True)

    def resume_writing(self) -> None:
        self._engine.set_sink_paused(self, is_paused=False)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._on_lost()
        self._engine.drop(self)

    def _beat(self) -> None:
        """Say how busy the group is, if that has changed or nothing has been said for a while, and go on so."""
        if self.transport.is_closing():
            return
        num_elsewhere = self._engine.num_open - self._engine.num_open_of(self)
        if num_elsewhere != self._num_elsewhere or not self._has_sent:
            self._num_elsewhere = num_elsewhere
            self.send(())
        self._has_sent = False
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)


class OutputSenders:
    """A leader's connections, one to each gateway that has sent it a request."""

    def __init__(self, engine_id: str, engine: AsyncEngine) -> None:
        self._engine_id = engine_id
        self._engine = engine
        self._connections: dict[ReturnAddress, asyncio.Task[GatewayConnection]] = {}

    async def to(self, address: ReturnAddress) -> GatewayConnection:
        """The connection to a gateway, made and authenticated if there is none. Raises OSError and TimeoutError."""
        if address not in self._connections:
            self._connections[address] = asyncio.create_task(self._connect(address))
        # Several requests may wait for it, and a client that leaves ends its own alone.
        connection = await asyncio.shield(self._connections[address])
        if connection.transport.is_closing():
            raise ConnectionResetError("the gateway has closed its connection")
        return connection

    async def _connect(self, address: ReturnAddress) -> GatewayConnection:
        def forget() -> None:
            self._connections.pop(address, None)

        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: GatewayConnection(self._engine_id, self._engine, address.secret, forget),
                    address.host,
                    address.port,
                )
                await connection.established()
        except BaseException:
            forget()
            raise
        return connection

    def close(self) -> None:
        """Close all."""
        for task in list(self._connections.values()):
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().transport.close()
            else:
                task.cancel()

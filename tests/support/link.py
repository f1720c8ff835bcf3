"""The gateway's end of the link to its groups."""

from serving.gateway.groups.loads import GroupLoads
from serving.gateway.groups.output_receiver import OutputReceiver

HOST = "127.0.0.1"


async def listening() -> OutputReceiver:
    """A gateway's end. Stop it."""
    receiver = OutputReceiver(GroupLoads())
    await receiver.start(HOST)
    return receiver

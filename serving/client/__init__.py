"""The Python client of a gateway."""

from serving.client.client import Client, StreamTimes, chat_prompt, explain
from serving.client.tls import ClientTls, client_tls

__all__ = ["Client", "ClientTls", "StreamTimes", "chat_prompt", "client_tls", "explain"]

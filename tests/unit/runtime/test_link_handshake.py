"""Who may connect: only a rank that knows the group's secret and epoch; nobody else disturbs the start."""

import contextlib
import secrets
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from model_parallel.errors import ConfigError
from model_parallel.runtime import rank_link as link
from model_parallel.runtime.rank_link import Connection, LeaderMessage, Listener, RankMessage, Stop, connect
from model_parallel.transport.frames import LinkError, encode_frame
from tests.support.waiting import PATIENCE_S

SECRET = bytes(range(32))
EPOCH = 7


class Group:
    """A listener for two ranks that is being waited on."""

    def __init__(self, pool: ThreadPoolExecutor, num_ranks: int = 2, timeout_s: float = PATIENCE_S) -> None:
        self.listener = Listener("127.0.0.1", secret=SECRET, epoch=EPOCH, num_ranks=num_ranks)
        self.port = self.listener.port
        self.accepted: Future[list[Connection[RankMessage]]] = pool.submit(
            self.listener.accept_all, timeout_s, lambda: None
        )

    def connect(self, rank: int, *, secret: bytes = SECRET, epoch: int = EPOCH) -> Connection[LeaderMessage]:
        return connect("127.0.0.1", self.port, secret=secret, epoch=epoch, rank=rank, timeout_s=PATIENCE_S)

    def finish(self) -> None:
        """Both ranks come, and the start succeeds."""
        ranks = [self.connect(1), self.connect(0)]
        leader_side = self.accepted.result(PATIENCE_S)
        for connection in leader_side:
            connection.send(Stop())
        for connection in ranks:
            assert connection.receive(PATIENCE_S) == Stop()
        for end in (*ranks, *leader_side):
            end.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def raw(group: Group, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", group.port), PATIENCE_S)
    sock.sendall(data)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Whether the other end closes it within a few seconds, without a word."""
    with contextlib.closing(sock):
        sock.settimeout(PATIENCE_S)
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


def test_ranks_connect_in_any_order_and_the_listener_closes(pool: ThreadPoolExecutor) -> None:
    group = Group(pool)
    group.finish()
    with pytest.raises(LinkError, match="cannot reach the leader"):
        group.connect(0)


@pytest.mark.parametrize("changed", [{"secret": bytes(32)}, {"epoch": EPOCH - 1}, {"epoch": EPOCH + 1}])
def test_wrong_secret_or_epoch_is_refused(pool: ThreadPoolExecutor, changed: dict[str, object]) -> None:
    group = Group(pool)
    with pytest.raises(LinkError):
        group.connect(0, **changed)  # type: ignore[arg-type]
    group.finish()


@pytest.mark.parametrize("rank", [2, 2**32 - 1])
def test_rank_that_the_group_does_not_have_is_refused(pool: ThreadPoolExecutor, rank: int) -> None:
    group = Group(pool)
    with pytest.raises(LinkError):
        group.connect(rank)
    group.finish()


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, secrets.token_bytes(200), b"\x80\x04." * 50]
)
def test_garbage_is_closed(pool: ThreadPoolExecutor, data: bytes) -> None:
    group = Group(pool)
    assert is_closed(raw(group, data))
    group.finish()


def test_silent_and_slow_connections_are_closed_and_delay_nobody(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HANDSHAKE_TIMEOUT_S", 0.5)
    group = Group(pool)
    silent = [raw(group, b"packtrn1"[:n]) for n in range(8)]
    assert all(is_closed(sock) for sock in silent)
    monkeypatch.undo()
    group.finish()


def test_flood_of_silent_connections_does_not_prevent_the_start(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HANDSHAKE_TIMEOUT_S", 0.2)  # must expire
    with contextlib.ExitStack() as silent:
        group = Group(pool)
        for _ in range(80):
            silent.enter_context(raw(group, b""))
        monkeypatch.undo()
        group.finish()


def test_nobody_is_heard_any_more_after_the_start(pool: ThreadPoolExecutor) -> None:
    group = Group(pool, num_ranks=1)
    silent = raw(group, b"")
    rank = group.connect(0)
    (leader,) = group.accepted.result(PATIENCE_S)
    assert not [t for t in threading.enumerate() if t.name == "packtrain-handshake"]
    assert is_closed(silent)
    rank.close()
    leader.close()


def test_second_connection_of_a_rank_is_refused(pool: ThreadPoolExecutor) -> None:
    """Of two that come at once, the leader may look at either first."""
    group = Group(pool)
    ends = [group.connect(0), group.connect(0)]
    readable, _, _ = select.select([end.sock for end in ends], [], [], PATIENCE_S)
    (accepted,) = (end for end in ends if end.sock not in readable)
    (refused,) = (end for end in ends if end.sock in readable)
    with pytest.raises(LinkError, match=r"closed|broke"):
        refused.receive(PATIENCE_S)
    other = group.connect(1)
    leader_side = group.accepted.result(PATIENCE_S)
    leader_side[0].send(Stop())
    assert accepted.receive(PATIENCE_S) == Stop()
    for end in (*ends, other, *leader_side):
        end.close()


def test_rank_refuses_a_leader_without_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            sock, _ = server.accept()
            with contextlib.closing(sock):
                sock.recv(100)
                sock.sendall(secrets.token_bytes(64))
                assert sock.recv(100) == b""  # the rank sends no proof to it

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(LinkError, match="does not know the secret"):
            connect("127.0.0.1", server.getsockname()[1], secret=SECRET, epoch=EPOCH, rank=0)
        thread.join(PATIENCE_S)


def test_recorded_handshake_cannot_be_replayed(pool: ThreadPoolExecutor) -> None:
    """Every byte that a rank once sent, sent again, does not pass: the leader's nonce is new."""
    sent: list[bytes] = []
    group = Group(pool)
    with socket.create_server(("127.0.0.1", 0)) as tap:

        def relay() -> None:
            rank_side, _ = tap.accept()
            leader_side = socket.create_connection(("127.0.0.1", group.port), PATIENCE_S)
            with rank_side, leader_side:
                for from_rank, size in ((True, 52), (False, 64), (True, 32)):
                    source, target = (rank_side, leader_side) if from_rank else (leader_side, rank_side)
                    data = source.recv(size, socket.MSG_WAITALL)
                    if from_rank:
                        sent.append(data)
                    target.sendall(data)

        thread = threading.Thread(target=relay)
        thread.start()
        connect("127.0.0.1", tap.getsockname()[1], secret=SECRET, epoch=EPOCH, rank=0).close()
        thread.join(PATIENCE_S)
    for end in (group.connect(1), *group.accepted.result(PATIENCE_S)):
        end.close()

    again = Group(pool)
    replayed = raw(again, b"".join(sent))
    assert len(replayed.recv(64, socket.MSG_WAITALL)) == 64
    assert is_closed(replayed)
    again.finish()


def test_absent_ranks_are_named(pool: ThreadPoolExecutor) -> None:
    group = Group(pool, num_ranks=3, timeout_s=0.3)  # must expire
    present = group.connect(1)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] did not connect within 0.3 s"):
        group.accepted.result(PATIENCE_S)
    with pytest.raises(LinkError):
        present.receive(PATIENCE_S)
    present.close()


def test_check_can_give_up(pool: ThreadPoolExecutor) -> None:
    listener = Listener("127.0.0.1", secret=SECRET, epoch=EPOCH, num_ranks=1)

    def give_up() -> None:
        raise RuntimeError("a rank has died")

    with pytest.raises(RuntimeError, match="a rank has died"):
        listener.accept_all(PATIENCE_S, give_up)


def test_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 bytes; it must have 32"):
        Listener("127.0.0.1", secret=bytes(16), epoch=EPOCH, num_ranks=1)


@pytest.mark.parametrize(
    "send",
    [
        lambda c: c.send(Stop()),  # a message that only a leader sends
        lambda c: c.send_frame(encode_frame(b"\xc1 not msgpack")),
        lambda c: c.send_frame(encode_frame(b"")),
        lambda c: c.send_frame(b"\xff" * 8),
    ],
)
def test_frame_that_the_protocol_does_not_allow_breaks_the_link(
    pool: ThreadPoolExecutor, send: Callable[[Connection[LeaderMessage]], None]
) -> None:
    group = Group(pool, num_ranks=1)
    rank = group.connect(0)
    (leader,) = group.accepted.result(PATIENCE_S)
    send(rank)
    with pytest.raises(LinkError):
        leader.receive(PATIENCE_S)
    rank.close()
    leader.close()


def test_receiving_has_a_deadline(pool: ThreadPoolExecutor) -> None:
    group = Group(pool, num_ranks=1)
    rank = group.connect(0)
    (leader,) = group.accepted.result(PATIENCE_S)
    rank.send_frame(rank.encode(Stop())[:-1])
    with pytest.raises(TimeoutError):
        leader.receive(0.1)
    rank.close()
    leader.close()

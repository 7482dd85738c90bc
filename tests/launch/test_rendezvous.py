"""A host that comes back meets the ones that stayed: torch's rendezvous as the exported scripts set it up."""

import re
import threading
import time
from datetime import timedelta
from importlib import resources

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SETTINGS = resources.files("ultralong.launch").joinpath("pieces", "settings.sh").read_text(encoding="utf-8")


def host(server, patience: float) -> DynamicRendezvousHandler:
    """What an agent joins with: a store of its own connection, and a dead host is one silent for five seconds."""
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=patience))
    backend = C10dRendezvousBackend(store, "run")
    return DynamicRendezvousHandler.from_backend(
        "run", store, backend, 2, 2, local_addr="127.0.0.1", keep_alive_interval=1, keep_alive_max_attempt=5
    )


def meet(*hosts: DynamicRendezvousHandler, between=lambda: None) -> list:
    """What each host finds in the next round: its place and the store of the ranks, or the error.

    They join in this order, with `between` before the second one.
    """
    found: list = [None] * len(hosts)

    def join(number: int) -> None:
        try:
            found[number] = hosts[number].next_rendezvous()
        except RuntimeError as error:  # what a store raises
            found[number] = error

    threads = [threading.Thread(target=join, args=(number,), daemon=True) for number in range(len(hosts))]
    threads[0].start()
    between()
    threads[1].start()
    for thread in threads:
        thread.join()
    return found


def state_of(host: DynamicRendezvousHandler):
    return host._state_holder.state


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("lost", "order"), [(1, "together"), (0, "together"), (1, "back before the other notices"), (1, "back late")]
)
def test_a_host_that_comes_back_is_told_the_store_of_the_round(monkeypatch, lost, order):
    value = re.search(rf'^  export {SWITCH}="\$\{{{SWITCH}:-(\d)\}}"$', SETTINGS, re.MULTILINE)
    assert value, "the scripts leave the switch as torch has it"
    monkeypatch.setenv(SWITCH, value[1])
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True)
    hosts = [host(server, 60) for _ in range(2)]
    first = meet(*hosts)
    hosts[lost]._stop_heartbeats()  # all that the others learn of a host that lost its power
    hosts[lost] = host(server, 60)
    stayed, back = hosts[1 - lost], hosts[lost]
    if order == "back before the other notices":  # into a round that is whole: it may wait there only
        second = meet(back, stayed, between=lambda: wait_for(lambda: state_of(back).redundancy_list))
    elif order == "back late":  # the one that stayed has begun the next round alone
        second = meet(stayed, back, between=lambda: wait_for(lambda: state_of(stayed).round == 1))
    else:
        second = meet(*hosts)
    for found in (first, second):
        assert {each.rank for each in found} == {0, 1}
        assert found[0].bootstrap_store_info == found[1].bootstrap_store_info, "the ranks would meet in two places"
    for each in hosts:
        each._stop_heartbeats()


def test_torch_by_itself_still_leaves_a_host_that_comes_back_waiting(monkeypatch):
    """Should this fail, torch tells it now, and the scripts may share the agents' store again."""
    monkeypatch.setenv(SWITCH, "0")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True)
    stayed, lost = host(server, 60), host(server, 60)
    meet(stayed, lost)
    lost._stop_heartbeats()
    back = host(server, 4)  # an agent waits 60 seconds
    found = meet(stayed, back)
    assert found[0].rank == 0
    assert isinstance(found[1], dist.DistStoreError)
    assert "MASTER_ADDR" in str(found[1])
    for each in (stayed, back):
        each._stop_heartbeats()

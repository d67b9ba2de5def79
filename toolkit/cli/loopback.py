"""How processes of one machine find each other, and send each other pickles, out of the reach of other machines."""

import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ADDRESS = "127.0.0.1"
_INTERFACES = ("lo", "lo0")
_START = timedelta(minutes=10)


def listening_store() -> "TCPStore":
    """The store of the process that starts the others, on a free port. One that torch opens listens everywhere."""
    from torch.distributed import TCPStore

    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        return TCPStore(
            ADDRESS, port, is_master=True, timeout=_START, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def joined_store(port: int) -> "TCPStore":
    """The store that another process of this machine listens for."""
    from torch.distributed import TCPStore

    return TCPStore(ADDRESS, port, is_master=False, timeout=_START, wait_for_workers=False)


def keep_gloo_local(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo listen there too, and not where the machine's name points to; what the user has set stays."""
    here = {name for _, name in socket.if_nameindex()}
    found = next((name for name in _INTERFACES if name in here), None)
    if found is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", found)

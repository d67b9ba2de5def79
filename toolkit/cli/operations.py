"""Options of ``toolkit serve`` for those who run it: admin endpoints, limits of clients, the log of requests."""

import argparse
import ipaddress
import os
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.sentences import shown

ADMIN_KEY_VARIABLE = "TOOLKIT_ADMIN_API_KEY"


def add_operation_options(group: Any) -> None:
    """Options of the group "operation"."""
    group.add_argument(
        "--admin-api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help=f"keys of the admin endpoints, of which one must be sent (default: ${ADMIN_KEY_VARIABLE}, or none)",
    )
    group.add_argument(
        "--enable-admin-endpoints",
        action="store_true",
        help="open the admin endpoints without an admin key; on 127.0.0.1 or a Unix domain socket only",
    )
    group.add_argument(
        "--max-requests-per-client",
        type=int,
        metavar="N",
        help="most unfinished sequences of one API key, or of one address without keys (429 beyond; default: no bound)",
    )
    group.add_argument(
        "--log-requests",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write a line of JSON per request to a file, or to standard error; it holds no prompts",
    )
    group.add_argument("--log-prompts", action="store_true", help="write requests' bodies into that log too")


def operation_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``ServerConfig`` that the options give.

    Raises:
        ToolkitError: for admin endpoints open to others, and other bad values.
    """
    from toolkit.serving.access import AdminAccess
    from toolkit.serving.request_log import JsonLog

    of_environment = os.environ.get(ADMIN_KEY_VARIABLE)
    keys = tuple(args.admin_api_key or ([of_environment] if of_environment else []))
    if args.enable_admin_endpoints and not keys and not (args.uds or _is_loopback(args.host)):
        raise ToolkitError(
            f"--admin-api-key must be given with --enable-admin-endpoints on --host {shown(args.host)}; without a key "
            "they are served on 127.0.0.1 only."
        )
    most = args.max_requests_per_client
    if most is not None and most < 1:
        raise ToolkitError(f"--max-requests-per-client must be >= 1, got {most}.")
    if args.log_prompts and args.log_requests is None:
        raise ToolkitError("--log-requests must be given with --log-prompts.")
    return {
        "admin": AdminAccess(keys, args.enable_admin_endpoints),
        "max_requests_per_client": most,
        "log": None if args.log_requests is None else JsonLog(args.log_requests, args.log_prompts),
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

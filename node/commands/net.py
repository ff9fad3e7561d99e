"""`isthmus net verify`: how true the emulated network is on this host, as a table, as Markdown, as one JSON object."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netem.config import apply_overrides, convert
from netem.errors import ConfigError
from netem.network import Profile
from netem.profile import NetConfig, resolve
from netem.verify.certificate import certify_profiles
from netem.verify.render import as_json, as_markdown, as_text
from netem.verify.suites import SUITES, run_suite
from node.commands.node import interrupt

_PROFILE = "internet-300mbps"


@dataclass(frozen=True)
class Wish:
    """What the command line asks for. Without a suite, the profiles are certified."""

    profiles: tuple[str, ...]
    suite: str
    quick: bool
    json: bool
    markdown: Path | None
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """The line that makes the same again."""
        profiles = [part for profile in self.profiles for part in ("--profile", profile)]
        suite = ["--suite", self.suite] if self.suite else []
        quick = ["--quick"] if self.quick else []
        return shlex.join(["isthmus", "net", "verify", *profiles, *suite, *quick, *self.overrides])


def verify(wish: Wish) -> int:
    """Measure and print; the exit code: 0 where the network is true, 1 where it is untrusted."""
    if wish.suite and wish.suite not in SUITES:
        raise ConfigError(f"--suite {wish.suite}: expected one of {', '.join(SUITES)}")
    if wish.suite and (wish.profiles or wish.overrides):
        raise ConfigError(f"--suite {wish.suite}: has networks of its own; leave --profile and --net.… out")
    if wish.markdown is not None and not wish.markdown.parent.is_dir():
        raise ConfigError(f"--markdown {wish.markdown}: there is no folder {wish.markdown.parent}")
    profiles = [_profile(name, wish.overrides) for name in wish.profiles or (_PROFILE,)]
    signal.signal(signal.SIGTERM, interrupt)  # namespaces and busy processes are to be removed then too
    certificate = run_suite(wish.suite, wish.quick, _say) if wish.suite else None
    if certificate is None:
        certificate = certify_profiles(profiles, wish.quick, _say)
    if wish.markdown is not None:
        title = SUITES[wish.suite].title if wish.suite else ", ".join(profile.name for profile in profiles)
        wish.markdown.write_text(as_markdown(certificate, title, wish.command), encoding="utf-8")
    print(as_json(certificate) if wish.json else as_text(certificate))
    return 0 if certificate.verdict == "true" else 1


def _profile(name: str, overrides: Sequence[str]) -> Profile:
    tree = apply_overrides({}, [*overrides, f"--net.profile={name}"], {"net.profile"})
    if other := [section for section in tree if section != "net"]:
        raise ConfigError(f"--{other[0]}.…: only settings of the network are of use here, such as --net.dilation 50")
    return resolve(convert(NetConfig, tree["net"], "net"))


def _say(text: str) -> None:
    """Progress goes beside the result."""
    print(f"measuring: {text}", file=sys.stderr, flush=True)

from netem.host import warning
from netem.profile import Profile

HOME = Profile(name="home", rate_bps=300e6)
SITE = Profile(name="site", rate_bps=100e9, scope="nic")


def test_a_host_that_can_says_nothing() -> None:
    assert warning(HOME, 4, measured_bps=12 * 300e6) is None
    assert warning(Profile(), 4) is None  # unshaped: nothing is promised, nothing measured
    assert warning(SITE, 1) is None


def test_a_host_that_cannot_says_what_was_asked_and_what_there_is() -> None:
    text = warning(HOME, 4, measured_bps=3e9)
    assert text is not None
    assert "profile home asks for 300 Mbit/s × 12 links = 3.6 Gbit/s" in text
    assert "this host carries about 3 Gbit/s" in text
    assert warning(HOME, 4, links=6, measured_bps=3e9) is None


def test_in_scope_nic_the_nics_count() -> None:
    text = warning(SITE, 4, measured_bps=13.2e9)
    assert text is not None
    assert "100 Gbit/s × 4 NICs = 400 Gbit/s" in text
    assert "13 Gbit/s" in text

import pytest

from peerd.linux import is_kernel_with_broken_gso, is_kernel_without_gro


@pytest.mark.parametrize(
    ("release", "without_gro", "broken_gso"),
    [
        ("4.19.0", True, False),
        ("5.11.22-generic", True, False),
        ("5.12", False, False),
        ("6.18.44-fc-v669", False, False),
        ("6.99.1", False, False),
        ("7.0", False, True),
        ("7.0.0-rc1", False, True),
        ("7.1.4", False, True),
        ("7.1.5", False, False),
        ("10.0.1", False, False),
        ("not a version", True, False),
    ],
)
def test_what_is_known_of_a_kernel(release: str, without_gro: bool, broken_gso: bool) -> None:
    assert is_kernel_without_gro(release) is without_gro
    assert is_kernel_with_broken_gso(release) is broken_gso

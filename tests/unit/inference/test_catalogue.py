"""Models that are found at backends."""

from agent360.mesh.inference.catalogue import Catalogue


def test_names_that_no_header_can_hold_are_not_taken_from_a_server():
    catalogue = Catalogue()
    catalogue.discovered({"gpu": ["llama", "", "auto", "a\nX: y", "x" * 300], "cpu": ["llama"]})
    (found,) = catalogue.usable("acme")
    assert (found.name, found.backends) == ("llama", ("gpu", "cpu"))

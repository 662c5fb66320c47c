"""Elastic building blocks."""

from automoe_jax.model.layers import compiled_widths


def test_a_width_gets_a_program_where_that_spares_enough():
    """A full-size supernet has one for each; in a small one narrower subnets run at the next."""
    assert compiled_widths((512, 640), 4096) == (512, 640)
    assert compiled_widths((128, 192), 1536) == (192,)
    assert compiled_widths((128, 192), 4096) == (128, 192)
    assert compiled_widths((256, 272, 640), 1024) == (272, 640)
    assert compiled_widths((16,), 1) == (16,)

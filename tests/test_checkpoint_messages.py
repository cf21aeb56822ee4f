"""What libraries say of a checkpoint that was given up is not shown; what others say is."""

import asyncio
import gc

import pytest

from salcl_jax import checkpoint_messages


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError('OUT_OF_RANGE: Error writing "w/0": Failed to write 9 bytes: File too large'), False),
        (ValueError("NOT_FOUND: no such key"), False),
        (ValueError("of a notebook's own task"), True),
        (KeyError("NOT A STATUS"), True),
    ],
)
def test_errors_of_abandoned_writes_are_not_told_one_by_one(error, shown, caplog):
    checkpoint_messages.quieten()
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(error)
    gc.collect()
    loop.close()
    assert ("never retrieved" in caplog.text) is shown

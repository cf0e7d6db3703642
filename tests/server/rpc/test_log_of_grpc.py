"""What gRPC's own code logs: a client that goes is no error of the server's, anything else is."""

import logging
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("ExecuteBatchError raised in core by servicer method [/jaxserve.v1.Inference/Generate]", False),
        ("Unexpected [ValueError] raised by servicer method [/jaxserve.v1.Inference/Generate]", True),
    ],
)
def test_only_a_client_that_left_is_kept_out_of_the_log(
    live: Any, caplog: pytest.LogCaptureFixture, message: str, told: bool
) -> None:
    logging.getLogger("grpc._cython.cygrpc").error(message)
    assert (message in caplog.text) == told

"""What two processes take while a network is dealt out."""

import pytest

from benchmarks.dealing import lines_of, main


def test_every_process_has_a_line():
    results = [{"highest": 1.234, "afterwards": 0.5}, {"highest": 0.4, "afterwards": 0.3}]
    assert lines_of("ddp", results) == [["ddp", "0", "1.23", "0.50"], ["ddp", "1", "0.40", "0.30"]]


def test_a_strategy_that_is_not_measured_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["fsdp"])
    assert "strategies ['fsdp'] must be of rlhf_fsdp2, ddp" in capsys.readouterr().err

"""ScaleMonitor: what it counts and what it prints."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.plugins.trainer.scale_monitor import count_tokens
from tests.helpers.trainers import Regressor, fit


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (torch.zeros(3, 7, dtype=torch.long), 21),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.ones(2, 5)}, 10),
        ([torch.zeros(4, 8), torch.zeros(4)], 4),
        ("nothing", 0),
    ],
)
def test_tokens_of_a_batch(batch, tokens):
    assert count_tokens(batch) == tokens


def test_tables_say_where_bytes_live_and_time_went(capsys):
    fit(Regressor(), "superoffload", precision="bf16-true", callbacks=[lss.ScaleMonitor(every_n_steps=3)])
    out = capsys.readouterr().out
    for words in ("Where the bytes live", "optimizer states", "Where the time went", "optimizer: update", "tokens/s"):
        assert words in out
    # 2 bytes per trained parameter: gradients of 17 * 33 + 33 + 33 + 33 + 33 * 5 + 5 elements. Weights go back
    # in the same dtype; whole units are sent slice by slice here, because `unused` has no gradient.
    assert "1.6 KiB of gradients to the host and 1.6 KiB of weights back per step" in " ".join(out.split())


def test_phases_add_up_to_the_wall_time():
    monitor = lss.ScaleMonitor()
    seen = {}

    class Spy(lss.ScaleMonitor):
        pass

    class Check(type(monitor)):
        def on_train_end(self, trainer, pl_module):
            table = self.time_table(trainer)
            shares = [float(cell.rstrip("%")) for cell in table.columns[2]._cells]
            seen["total"] = sum(shares)
            seen["negative"] = [s for s in shares if s < 0]

    fit(Regressor(), "superoffload", callbacks=[Check()])
    assert seen["total"] == pytest.approx(100, abs=1.0)
    assert not seen["negative"]


def test_monitor_works_under_a_stock_strategy(capsys):
    fit(Regressor(), "auto", callbacks=[lss.ScaleMonitor()])
    out = capsys.readouterr().out
    assert "Where the time went" in out
    assert "Where the bytes live" not in out


def test_a_period_below_one_is_refused():
    with pytest.raises(ValueError, match="ScaleMonitor.every_n_steps must be a whole number of at least 1, found 0"):
        lss.ScaleMonitor(every_n_steps=0)

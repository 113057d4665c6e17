"""The report: what it adds up, how it reads, what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fxrep.report import Report, Rewrite, Skip

BLOCK = Rewrite(
    pass_name="branches",
    where="stages.0.1.conv",
    before=("conv2d",) * 3 + ("batch_norm",) * 3 + ("add",) * 2,
    after=("conv2d",),
    macs_before=25600,
    macs_after=23040,
    parameters_before=26000,
    parameters_after=23088,
    error=3e-16,
)
FOLD = Rewrite("batchnorm", "", ("conv2d", "batch_norm"), ("conv2d",), 64, 64, 80, 72, 1e-16)
TRAINING = "BatchNorm is in training mode"


def _report(skips: int = 0) -> Report:
    skipped = tuple(Skip("batchnorm", f"neck.{i}", TRAINING) for i in range(skips))
    return Report((BLOCK, FOLD), skipped, error=4e-7, baseline_error=5e-7)


def test_totals_are_differences() -> None:
    report = _report()
    assert report.removed == {"batch_norm": 4, "conv2d": 2, "add": 2}
    assert report.macs_saved == 2560
    assert report.parameters_saved == 2912 + 8
    assert report.largest_error == 3e-16


def test_a_rewrite_of_a_rewrite_is_not_counted_twice() -> None:
    # Three folds, then the sum of the three results: the convolutions pass through two rewrites.
    folds = (FOLD,) * 3
    total = dataclasses.replace(BLOCK, before=("conv2d",) * 3 + ("add",) * 2)
    assert Report((*folds, total), ()).removed == {"batch_norm": 3, "conv2d": 2, "add": 2}


def test_an_addition_counts_as_negative() -> None:
    split = dataclasses.replace(BLOCK, before=("conv2d",), after=("conv2d", "conv2d", "add"))
    assert Report((split,), ()).removed == {"conv2d": -1, "add": -1}


def test_rows_say_where_what_and_how_far() -> None:
    text = str(_report())
    row = next(line for line in text.splitlines() if line.startswith("stages.0.1.conv"))
    assert "3 conv2d + 3 batch_norm + 2 add -> 1 conv2d" in row
    assert "25,600 -> 23,040" in row
    assert "26,000 -> 23,088" in row
    assert "3.0e-16" in row


def test_passes_have_a_table_each_in_the_order_they_ran() -> None:
    text = str(_report())
    assert text.index("branches: 1 rewritten") < text.index("batchnorm: 1 rewritten")


def test_the_root_has_a_name() -> None:
    assert "(root)" in str(_report())


def test_totals_stand_below() -> None:
    last = str(_report()).rpartition("\n\n")[2]
    assert "4 batch_norm + 2 conv2d + 2 add" in last
    assert "2,920" in last
    assert "4.0e-07" in last and "5.0e-07" in last
    assert last == _report().summary()


@pytest.mark.parametrize("places", [1, 12])
def test_every_place_of_a_reason_is_shown(places: int) -> None:
    text = str(_report(skips=places))
    assert text.count(TRAINING) == 1
    assert all(f"neck.{i}" in text for i in range(places))


def test_a_reason_in_very_many_places_is_cut_short_and_says_so() -> None:
    report = _report(skips=100)
    assert "... and 88 more" in str(report)
    assert len(report.skipped) == 100
    assert len(report.to_dict()["skipped"]) == 100


def test_long_reasons_wrap_instead_of_running_off() -> None:
    skip = Skip("branches", "head", "a reason that goes on and on, " * 10)
    assert max(map(len, str(Report((), (skip,))).splitlines())) < 110


def test_numbers_in_names_stay_as_they_are() -> None:
    skip = Skip("batchnorm", "1e3", "0x10")
    text = str(Report((dataclasses.replace(BLOCK, where="0.10"),), (skip,)))
    assert "0.10 " in text and "1e3" in text and "0x10" in text


def test_what_was_not_validated_claims_no_error() -> None:
    report = Report((dataclasses.replace(BLOCK, error=None), FOLD), ())
    assert report.largest_error == FOLD.error
    row = next(line for line in str(report).splitlines() if line.startswith("stages.0.1.conv"))
    assert row.endswith(" -")
    assert report.to_dict()["rewrites"][0]["error"] is None


def test_a_stored_constant_is_no_operation() -> None:
    stored = Rewrite("constants", "conv.weight", ("mul",), ("constant",), 0, 0, 0, 0, None)
    assert Report((stored,), ()).removed == {"mul": 1}


def test_nothing_done_reads_well() -> None:
    text = str(Report((), ()))
    assert "operations removed" in text and "none" in text


def test_to_dict_survives_json() -> None:
    plain = _report(skips=2).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["rewrites"][0]["before"] == list(BLOCK.before)
    assert plain["skipped"][1] == {"pass_name": "batchnorm", "where": "neck.1", "reason": TRAINING}
    assert plain["totals"]["removed"] == {"batch_norm": 4, "conv2d": 2, "add": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_dict_has_no_numbers_that_json_lacks(value: float) -> None:
    report = Report((dataclasses.replace(BLOCK, error=value),), (), error=value)
    plain = report.to_dict()
    assert plain["error"] is None and plain["rewrites"][0]["error"] is None
    json.dumps(plain, allow_nan=False)


def test_all_three_are_frozen() -> None:
    for value in (_report(), BLOCK, Skip("a", "b", "c")):
        field = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)

"""Weights packed, checksummed and proved."""

import numpy as np
import pytest
import torch

from apportion.platform.errors import WeightSyncError
from apportion.platform.weights import SyncReceipt, WeightBundle, proof_metrics, prove

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.weight": torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def bundle() -> WeightBundle:
    packed = WeightBundle.pack(TENSORS.items(), 3)
    packed.data.flags.writeable = True
    return packed


def receipt(bundle: WeightBundle, **changes) -> SyncReceipt:
    sums = {e.name: e.checksum for e in bundle.entries}
    return SyncReceipt(
        **{
            "engine": "rollout-0",
            "version": 3,
            "checksums": sums,
            "checked_live": 3,
            "wrong": [],
            "proved": list(TENSORS),
            "read_bytes": 20,
            **changes,
        }
    )


def test_tensors_come_back_as_they_went_in(bundle):
    got = dict(bundle.tensors())
    assert got.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    assert bundle.nbytes == 6 * 4 + 3 * 2 + 8
    assert [e.offset for e in bundle.entries] == [0, 24, 30]


def test_a_transposed_tensor_is_packed_in_the_order_of_its_elements():
    packed = WeightBundle.pack([("t", TENSORS["a.weight"].T)], 0)
    assert torch.equal(dict(packed.tensors())["t"], TENSORS["a.weight"].T)


def test_one_flipped_bit_is_found_and_named(bundle):
    assert bundle.verify() == []
    bundle.data[25] ^= 1
    assert bundle.verify() == ["b.weight"]


def test_nothing_to_send_is_refused():
    with pytest.raises(WeightSyncError, match="got no tensor to send, expected the model's parameters"):
        WeightBundle.pack([], 0)


def test_a_right_receipt_is_accepted(bundle):
    prove([receipt(bundle), receipt(bundle, engine="rollout-1")], bundle.entries, 3)


def test_an_older_version_is_refused(bundle):
    with pytest.raises(WeightSyncError, match=r"^rollout-0: holds weights version 2, expected 3$"):
        prove([receipt(bundle, version=2)], bundle.entries, 3)


def test_a_changed_a_missing_and_an_unknown_tensor_are_named(bundle):
    sums = {e.name: e.checksum for e in bundle.entries}
    changed = sums | {"b.weight": "0" * 16}
    missing = {n: c for n, c in sums.items() if n != "c"}
    unknown = sums | {"d": "0" * 16}
    for wrong, name in ((changed, "b.weight"), (missing, "c"), (unknown, "d")):
        with pytest.raises(WeightSyncError, match=rf"1 of 3 tensors are not the trainer's after sync 3: {name};"):
            prove([receipt(bundle), receipt(bundle, engine="rollout-1", checksums=wrong)], bundle.entries, 3)


def test_what_the_engine_found_wrong_in_its_live_model_is_named(bundle):
    with pytest.raises(WeightSyncError, match=r"rollout-0: 1 of 3 tensors are not .* sync 3: a\.weight;"):
        prove([receipt(bundle, wrong=["a.weight"])], bundle.entries, 3)


def test_of_many_wrong_tensors_eight_are_named():
    packed = WeightBundle.pack([(f"t{i:02d}", torch.tensor(float(i))) for i in range(12)], 0)
    bad = SyncReceipt("rollout-0", 0, {}, 0, [], [])
    with pytest.raises(WeightSyncError, match=r"12 of 12 .* t00, t01, .*, t07 and 4 more;"):
        prove([bad], packed.entries, 0)


def test_a_sent_tensor_that_no_live_parameter_was_compared_with_is_named(bundle):
    partly = receipt(bundle, engine="rollout-1", proved=["b.weight"])
    with pytest.raises(
        WeightSyncError,
        match=r"^rollout-1: 2 of 3 sent tensors were not compared .* sync 3: a\.weight, c; .* train\.sync_unproved$",
    ):
        prove([receipt(bundle), partly], bundle.entries, 3)
    with pytest.raises(WeightSyncError, match=r"1 of 3 sent tensors .* sync 3: c;"):
        prove([partly], bundle.entries, 3, ["a.*"])
    prove([receipt(bundle), partly], bundle.entries, 3, ["*.weight", "c"])


def test_accepting_an_unproved_tensor_does_not_accept_a_wrong_one(bundle):
    with pytest.raises(WeightSyncError, match=r"1 of 3 tensors are not the trainer's after sync 3: a\.weight;"):
        prove([receipt(bundle, proved=[], wrong=["a.weight"])], bundle.entries, 3, ["*"])


def test_the_figures_are_those_of_the_engine_that_proved_least(bundle):
    receipts = [receipt(bundle), receipt(bundle, proved=["b.weight", "c"], read_bytes=9)]
    assert proof_metrics(receipts, bundle.entries) == {
        "sync/sent_bytes": 38, "sync/proved_bytes": 14, "sync/read_bytes": 9,
    }  # fmt: skip
    assert proof_metrics([receipt(bundle, proved=None)], bundle.entries) == {"sync/sent_bytes": 38}


def test_equal_bytes_have_equal_checksums_whatever_made_them():
    one = WeightBundle.pack([("x", torch.ones(4))], 0).entries[0].checksum
    other = WeightBundle.pack([("y", torch.from_numpy(np.ones(4, np.float32)))], 9).entries[0].checksum
    assert one == other


def test_an_earlier_buffer_of_the_same_size_is_filled_anew_and_another_left_alone():
    first = WeightBundle.pack([("t", torch.zeros(4))], 1)
    second = WeightBundle.pack([("t", torch.ones(4))], 2, first.data)
    assert second.data is first.data
    assert torch.equal(second.tensor(second.entries[0]), torch.ones(4))
    larger = WeightBundle.pack([("t", torch.zeros(5))], 3, second.data)
    assert larger.nbytes == 20 and second.verify() == []

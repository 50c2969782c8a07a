"""Rows read at a step, the same by every method of reading."""

import itertools
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.data import Batches, prepare


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "segment_ids", "positions"}
    for name in a:
        assert a[name].dtype == b[name].dtype == np.int32
        np.testing.assert_array_equal(a[name], b[name])


def take(batches, num):
    with iter(batches) as iterator:
        return list(itertools.islice(iterator, num))


def test_resume_at_every_step_equals_straight_reading(make_config):
    corpus = prepare(make_config(sequence_length=64, batch_size=64), 2)
    batches = corpus.batches("train")
    num = 2 * len(corpus.rows("train")) // 64 + 3  # into the third epoch
    straight = take(batches, num)
    for step in range(num):
        assert_same(batches.batch_at(step), straight[step])
        assert_same(take(corpus.batches("train", start_step=step), 1)[0], straight[step])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_worker_processes_threads_and_random_access_agree(make_config, with_data, split):
    corpus = prepare(make_config(fim_rate=0.5), 1)
    batches = corpus.batches(split, start_step=3)
    num = 12 if split == "train" else batches.num_batches - 3
    threads = take(batches, num)
    workers = prepare(with_data(corpus.config, num_workers=2), 1).batches(split, start_step=3)
    for i, batch in enumerate(take(workers, num)):
        assert_same(batch, threads[i])
        assert_same(batch, batches.batch_at(3 + i))


def test_pieces_of_processes_make_the_whole_batch(make_config):
    corpus = prepare(make_config(), 1)
    whole = take(corpus.batches("train"), 6)
    for num_processes in (2, 4, 8):
        size = 8 // num_processes
        pieces = [take(corpus.batches("train", row_slice=(p * size, (p + 1) * size)), 6) for p in range(num_processes)]
        for step in range(6):
            parts = [piece[step] for piece in pieces]
            assert_same({n: np.concatenate([p[n] for p in parts]) for n in parts[0]}, whole[step])


def test_every_depth_reads_the_same_bytes(make_config):
    batches = [prepare(make_config(), lookahead).batches("train") for lookahead in (0, 2, 4)]
    for step in (0, 5, 400):
        shallow, *deeper = (b.batch_at(step) for b in batches)
        for lookahead, batch in zip((2, 4), deeper, strict=True):
            assert batch["tokens"].shape == (8, 32 + 1 + lookahead)
            assert_same({n: v[:, :33] for n, v in batch.items()}, shallow)


def test_a_long_lookahead_changes_no_row_and_is_padded_at_the_end_of_the_stream(make_config):
    short, long = (prepare(make_config(), lookahead).rows("train") for lookahead in (2, 100))
    assert len(short) == len(long)
    for row in (0, len(short) - 1):
        for a, b in zip(short[row][:3], long[row][:3], strict=True):
            np.testing.assert_array_equal(b[: len(a)], a)
    tokens, segments, positions, _ = long[len(long) - 1]
    assert len(tokens) == 32 + 1 + 100 and segments[0] > 0 and segments[-1] == 0
    assert (tokens[segments == 0] == 0).all() and (positions[segments == 0] == 0).all()


def test_an_epoch_has_each_row_once_and_the_next_another_order(make_config):
    corpus = prepare(make_config(batch_size=1, sequence_length=256))
    rows, batches = corpus.rows("train"), corpus.batches("train")
    epochs = [[batches.batch_at(e * len(rows) + i)["tokens"].tobytes() for i in range(len(rows))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.tokens.tobytes() for row in rows)
    assert epochs[0] != epochs[1]


def test_epochs_of_neighbouring_seeds_differ(make_config):
    # grain shuffles epoch e by seed + e: unscattered, seed 1 would read in the order of seed 0, an epoch late
    rows = prepare(make_config()).rows("train")
    orders = []
    for seed in (0, 1):
        (order,) = Batches([rows], 1, shuffle_seed=seed, endless=True)._orders
        orders.append([[order[e * len(rows) + i] for i in range(len(rows))] for e in range(2)])
    assert all(a != b for a in orders[0] for b in orders[1])


def test_without_shuffle_rows_come_in_source_order_and_wrap_around(make_config):
    corpus = prepare(make_config(shuffle=False, batch_size=4))
    rows, batches = corpus.rows("train"), corpus.batches("train")
    for step in (0, 7, len(rows) // 4):
        expected = [rows[(4 * step + i) % len(rows)].tokens for i in range(4)]
        np.testing.assert_array_equal(batches.batch_at(step)["tokens"], expected)


def test_validation_is_finite_in_order_and_the_same_for_every_seed(make_config, tmp_path):
    (tmp_path / "v.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(2000)))
    settings = {"source": "text_files", "files": str(tmp_path / "v.txt"), "max_document_chars": 100}
    corpora = [prepare(make_config(seed=seed, fim_rate=1.0, **settings)) for seed in (0, 1)]
    batches = [c.batches("validation") for c in corpora]
    num, rows = batches[0].num_batches, corpora[0].rows("validation")
    assert num == len(rows) // 8 > 1
    read = take(batches[0], num + 5)
    assert len(read) == num
    for step, batch in enumerate(read):
        np.testing.assert_array_equal(batch["tokens"], [rows[8 * step + i].tokens for i in range(8)])
        assert_same(batch, batches[1].batch_at(step))
        assert batch["tokens"].max() < 258  # no FIM mark
    assert corpora[0].batches("train").batch_at(0)["tokens"].max() >= 258
    with pytest.raises(IndexError, match=f"batch {num} of {num}"):
        batches[0].batch_at(num)
    assert take(corpora[0].batches("validation", start_step=num), 1) == []


def test_more_workers_than_batches(make_config):
    corpus = prepare(make_config(batch_size=64, num_workers=3))
    batches = corpus.batches("validation", start_step=corpus.batches("validation").num_batches - 1)
    assert len(take(batches, 5)) == 1


def test_batches_pickle_without_their_tokens(make_config):
    batches = prepare(make_config()).batches("train")
    pickled = pickle.dumps(batches)
    assert len(pickled) < 20_000
    assert_same(pickle.loads(pickled).batch_at(5), batches.batch_at(5))


def test_contiguous_packing_is_one_segment(make_config):
    batch = prepare(make_config(packing="contiguous"), 2).batches("train").batch_at(3)
    assert (batch["segment_ids"] == 1).all()
    assert (batch["positions"] == np.arange(35)).all()


def test_bad_slices_and_steps_are_refused(make_config):
    corpus = prepare(make_config())
    for row_slice in ((4, 4), (-1, 3), (0, 9)):
        with pytest.raises(ValueError, match="row_slice"):
            corpus.batches("train", row_slice=row_slice)
    with pytest.raises(ValueError, match="start_step=-1"):
        corpus.batches("train", start_step=-1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_program_that_forgets_to_close_ends(make_config, num_workers):
    config = make_config(num_workers=num_workers)
    program = f"""
        from mtp_jax.config import from_dict
        from mtp_jax.data import prepare
        if __name__ == "__main__":
            iterator = iter(prepare(from_dict({{"data": {config.data.__dict__!r}}}, "test")).batches("train"))
            batch = next(iterator)
            print(iterator.step, flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_closed_iterator_is_reported(make_config):
    iterator = iter(prepare(make_config()).batches("train"))
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_no_validation_split_when_its_fraction_is_zero(make_config):
    corpus = prepare(make_config(validation_fraction=0.0))
    assert len(corpus.sources[0].validation) == 0 and len(corpus.sources[0].train) == len(corpus.sources[0].store)
    with pytest.raises(UserError, match=r"data.validation_fraction=0.0: leaves no validation documents"):
        corpus.batches("validation")

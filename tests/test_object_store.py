"""The object store of the tests: what clients read is what they wrote, and the faults are those that were asked for."""

import urllib.error
import urllib.request

import pytest
from etils import epath

from tests.object_store import FAULTS


def put(bucket, name, content, condition=""):
    url = f"{bucket.store.url}/upload/storage/v1/b/{bucket.name}/o?uploadType=media&name={name}{condition}"
    with urllib.request.urlopen(urllib.request.Request(url, content, method="POST"), timeout=10) as answer:
        return answer.status


def test_gcsfs_reads_what_it_wrote(bucket):
    path = epath.Path(bucket.url) / "a" / "b.txt"
    path.write_text("hello")
    assert path.read_text() == "hello" and [p.name for p in path.parent.iterdir()] == ["b.txt"]
    assert bucket.objects() == {"a/b.txt": b"hello"}
    path.rename(path.with_name("c.txt"))
    assert bucket.objects() == {"a/c.txt": b"hello"}


def test_tensorstore_reads_what_it_wrote(bucket):
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "gcs", "bucket": bucket.name, "path": "t/"}).result()
    first = store.write("x", b"1").result()
    assert store.read("x").result().value == b"1"
    # A conditional write that lost is refused
    second = store.write("x", b"2", if_equal=first.generation).result()
    assert second.generation == store.read("x").result().stamp.generation != first.generation
    store.write("x", b"3", if_equal=first.generation).result()
    assert bucket.objects() == {"t/x": b"2"}


def test_an_object_is_created_once(bucket):
    assert put(bucket, "lease", b"1", "&ifGenerationMatch=0") == 200
    with pytest.raises(urllib.error.HTTPError, match="412"):
        put(bucket, "lease", b"2", "&ifGenerationMatch=0")
    assert bucket.objects() == {"lease": b"1"}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_injected_once_and_has_its_effect(bucket, kind):
    bucket.inject(kind, match="POST .*name=x", skip=1, seconds=0.2)
    assert put(bucket, "x", b"first") == 200
    if kind == "slow":
        assert put(bucket, "x", b"second") == 200
    else:
        with pytest.raises(OSError, match=kind if kind.isdigit() else None):
            put(bucket, "x", b"second")
    is_done = kind in ("closed_after", "slow")
    assert bucket.objects() == {"x": b"second" if is_done else b"first"}
    assert put(bucket, "x", b"third") == 200 and bucket.objects() == {"x": b"third"}
    assert [fault for _, _, fault in bucket.requests()] == ["", kind, ""]


def test_a_bucket_has_no_faults_of_another(bucket):
    bucket.store.call("POST", "/faults", {"kind": "500", "times": None, "match": "", "skip": 0, "bucket": "other"})
    assert put(bucket, "x", b"1") == 200

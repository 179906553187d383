"""Checkpoints: exact, complete or absent, verified, never fewer than one."""

import json
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from firm_jax import checkpoint, storage
from firm_jax.checkpoint import Checkpointer, find_damage
from firm_jax.errors import CheckpointError
from firm_jax.mesh import make_mesh


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def bits(array):
    array = jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return np.asarray(array).tobytes()


def save(checkpointer, step, state, data=None, meta=None):
    checkpointer.save(step, state, data, meta or {})
    checkpointer.wait()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints of a small state; tests copy the folder before they damage it."""
    folder = tmp_path_factory.mktemp("written")
    checkpointer = Checkpointer(folder, keep=2)
    for step in (1, 2):
        save(checkpointer, step, {"w": jnp.full((64,), step, jnp.float32)}, {"next": step}, {"epoch": step})
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def test_every_bit_comes_back(tmp_path):
    odd = jnp.array([0.0, -0.0, jnp.nan, -jnp.inf, 1e-45], jnp.float32)
    state = {
        "lora": {"blocks/0": {"a": odd, "b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7}},
        "optimizer": (Moments(jnp.int32(7), {"x": -jnp.zeros((3, 5))}), None, ()),
        "keys": jax.random.split(jax.random.key(3), 2),
        "other_keys": jax.random.key(1, impl="rbg"),
        "flags": jnp.array([True, False]),
        "scalar": jnp.float32(0.1),
    }
    checkpointer = Checkpointer(tmp_path / "c", keep=1)
    save(checkpointer, 3, state, {"prompts": ["é", 1]}, {"epoch": 2})
    back = Checkpointer(tmp_path / "c", keep=1).restore(jax.eval_shape(lambda: state))
    assert jax.tree.structure(back.state) == jax.tree.structure(state)
    for saved, restored in zip(jax.tree.leaves(state), jax.tree.leaves(back.state), strict=True):
        assert restored.dtype == saved.dtype and restored.shape == saved.shape
        assert bits(restored) == bits(saved)
    assert (back.step, back.data, back.meta["epoch"]) == (3, {"prompts": ["é", 1]}, 2)


def test_restores_into_the_shardings_asked_for(tmp_path):
    mesh = make_mesh(2, 2, 2)
    before, after = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P(None, ("data", "fsdp")))
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8), before)
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1, {"w": array})
    for sharding in (before, after, SingleDeviceSharding(jax.devices()[3])):
        back = checkpointer.restore({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}).state["w"]
        assert back.sharding == sharding
        np.testing.assert_array_equal(back, array)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = np.array(state["w"])
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state, None, {})
    state = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)(state)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(checkpointer.restore(state).state["w"], expected)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_latest_stay(tmp_path, keep):
    checkpointer = Checkpointer(tmp_path, keep)
    for step in (5, 10, 20):
        save(checkpointer, step, {"w": jnp.float32(step)})
        assert checkpointer.steps()[-1] == step
    assert checkpointer.steps() == [5, 10, 20][-keep:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(str(step) for step in [5, 10, 20][-keep:])


def test_nothing_saved_is_none(tmp_path):
    assert Checkpointer(tmp_path / "none", keep=1).restore({"w": jnp.zeros(3)}) is None


@pytest.mark.fault("killed")
def test_what_a_kill_leaves_behind_is_not_a_checkpoint(copied):
    (copied / "2").rename(copied / ".saving-2")
    (copied / ".deleting-0").mkdir()
    assert Checkpointer(copied, keep=2).restore({"w": jnp.zeros(64)}).step == 1
    assert [path.name for path in copied.iterdir()] == ["1"]


def damage_flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, Path.unlink])
def test_damage_in_any_file_is_seen(copied, damage):
    files = [file.relative_to(copied / "2") for file in (copied / "2").rglob("*") if file.is_file()]
    assert {"manifest.json", "meta.json", "data.json"} < {str(file) for file in files}
    assert len(files) > 8
    for name in files:
        file = copied / "2" / name
        whole = file.read_bytes()
        if not whole and damage is not Path.unlink:
            continue
        assert find_damage(copied / "2") is None
        damage(file)
        assert find_damage(copied / "2"), name
        file.write_bytes(whole)


@pytest.mark.fault("damaged-checkpoint")
def test_any_flipped_byte_of_what_is_read_before_the_arrays_is_seen(copied):
    """Whether what remains is JSON or not; and `latest_meta` passes it over."""
    rng, whole = np.random.default_rng(0), Checkpointer(copied, keep=2)
    for name in ("manifest.json", "meta.json", "data.json"):
        file = copied / "2" / name
        content = file.read_bytes()
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= rng.integers(1, 256)
            file.write_bytes(flipped)
            assert find_damage(copied / "2"), (name, position, bytes(flipped))
            if name == "meta.json":
                assert whole.latest_meta()["epoch"] == 1
            elif name == "manifest.json":
                assert whole.latest_meta()["epoch"] in (1, 2)
        file.write_bytes(content)
    assert find_damage(copied / "2") is None and whole.latest_meta()["epoch"] == 2


@pytest.mark.fault("damaged-checkpoint")
def test_a_file_that_does_not_belong_is_seen(copied):
    (copied / "2" / "state" / "stray").write_text("x")
    assert "stray" in find_damage(copied / "2")


@pytest.mark.fault("damaged-checkpoint")
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(copied, caplog):
    damage_flip(max((copied / "2" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    checkpointer = Checkpointer(copied, keep=2)
    back = checkpointer.restore({"w": jnp.zeros(64)})
    assert (back.step, back.data) == (1, {"next": 1})
    np.testing.assert_array_equal(back.state["w"], np.ones(64))
    assert [path.name for path in checkpointer.damaged()] == ["2.damaged"]
    assert "DAMAGED" in caplog.text
    save(checkpointer, 2, {"w": jnp.zeros(64)})
    damage_truncate(copied / "2" / "data.json")
    assert checkpointer.restore({"w": jnp.zeros(64)}).step == 1
    assert [path.name for path in checkpointer.damaged()] == ["2.damaged", "2.damaged-2"]


@pytest.mark.fault("damaged-checkpoint")
def test_nothing_whole_left_is_an_error_each_time(copied):
    for step in ("1", "2"):
        (copied / step / "meta.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"1\.damaged, 2\.damaged.*--workdir"):
            Checkpointer(copied, keep=2).restore({"w": jnp.zeros(64)})


@pytest.mark.fault("other-model")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": jnp.zeros(65)}, r"w: float32\[64\] in the checkpoint, float32\[65\] in this run"),
        ({"w": jnp.zeros(64, jnp.bfloat16)}, r"w: float32\[64\] in the checkpoint, bfloat16\[64\]"),
        ({"v": {"x": jnp.zeros(64)}}, r"v/x: not in the checkpoint\n  w: only in the checkpoint"),
    ],
)
def test_another_model_is_an_error_that_names_the_leaves(copied, state, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(copied, keep=2).restore(state)
    assert Checkpointer(copied, keep=2).steps() == [1, 2]


@pytest.mark.fault("disk-full")
def test_a_save_that_fails_leaves_the_previous_checkpoint_and_no_half(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1, {"w": jnp.ones(8)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 64 KiB: the write of the arrays fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        checkpointer.save(2, {"w": jax.random.normal(jax.random.key(0), (100_000,))}, None, {})
        with pytest.raises(CheckpointError, match=rf"{tmp_path}.*(?s:.)*checkpoint 1 is intact"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpointer.restore({"w": jnp.zeros(8)}).step == 1
    save(checkpointer, 2, {"w": jnp.ones(8)})
    assert checkpointer.steps() == [2]


@pytest.mark.fault("hanging-storage")
def test_hanging_storage_is_an_error(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(checkpoint, "_sync_tree", lambda folder: release.wait(10))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, {"w": jnp.ones(8)}, None, {})
    started = time.monotonic()
    for _ in range(2):  # the limit is that of the save, not of everyone who waits for it
        with pytest.raises(CheckpointError, match="hangs"):
            checkpointer.wait()
    assert time.monotonic() - started < 2
    assert checkpointer.steps() == []
    release.set()
    while not checkpointer.steps():
        time.sleep(0.01)


def test_saving_a_step_again_changes_nothing(copied):
    checkpointer = Checkpointer(copied, keep=2)
    save(checkpointer, 2, {"w": jnp.zeros(64)}, {"next": 99})
    assert json.loads((copied / "2" / "data.json").read_text()) == {"next": 2}
    assert find_damage(copied / "2") is None


def test_only_one_module_knows_orbax():
    package = Path(__file__).parent.parent / "firm_jax"
    users = [
        path.name for path in package.rglob("*.py") if "import orbax" in (t := path.read_text()) or "from orbax" in t
    ]
    assert users == ["checkpoint.py"]

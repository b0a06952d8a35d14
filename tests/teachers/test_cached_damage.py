"""A cache that is damaged, or of something else, is refused by name; and what a kill leaves is gone on with."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dts_hf.errors import UserError
from dts_hf.files import file_sha256
from dts_hf.teachers.cached.layout import MANIFEST, row_key, shard_ranges
from dts_hf.teachers.cached.manifest_form import HEAD, INDEX
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.cached.writer import Rows, make_plan
from tests.support.cached import cache_of, edit_manifest
from tests.support.streams import as_stream
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, encoded, trainer_for


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("made") / "states", tiny_llama(seed=1), shard_bytes=6000)


@pytest.fixture
def cache(made, tmp_path):
    shutil.copytree(made, tmp_path / "states")
    return tmp_path / "states"


def train(tmp_path, cache, **options):
    trainer = trainer_for(tmp_path / "run", teacher=CachedTeacher(cache), **options)
    trainer.train()


def flip(path, at=-200):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verify(cache):
    return list(StateCache(cache).verify())


def test_a_whole_cache_is_whole(cache, tmp_path):
    manifest = StateCache(cache).manifest
    assert len(manifest.shards) >= 3
    assert sum(verify(cache)) == manifest.labels == sum(encoded().target_counts)
    train(tmp_path, cache)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found_as_its_row_is_read(cache, seed):
    whole, random = StateCache(cache), np.random.default_rng(seed)
    path = cache / whole.manifest.shards[1]["file"]
    states = load_file(path)["states"]
    at = path.read_bytes().index(states.numpy().tobytes()) + int(random.integers(states.nbytes))
    flip(path, at)
    opened = StateCache(cache)  # the size is right
    with pytest.raises(UserError, match=rf"{path.name}: row \d+ of the cache is not as it was written: its checksum"):
        for row in range(len(opened)):
            opened.row(row)
    with pytest.raises(UserError, match=rf"{path.name}: sha256"):
        verify(cache)


def test_a_flipped_bit_stops_training_by_name(cache, tmp_path):
    shards = sorted(cache.glob("states-*"))
    for path in shards:
        flip(path, path.read_bytes().index(load_file(path)["states"].numpy().tobytes()) + 40)
    with pytest.raises(UserError, match=r"states-0000\d.safetensors: row"):
        train(tmp_path, cache, options={"dataloader_num_workers": 1})


def test_a_cut_shard(cache):
    path = cache / "states-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"states-00001.safetensors: has [\d,]+ bytes, expected .*cut"):
        StateCache(cache)
    path.unlink()
    with pytest.raises(UserError, match=r"states-00001.safetensors: is missing"):
        StateCache(cache)


def test_swapped_shards(cache, tmp_path):
    one, other = (cache / f"states-0000{n}.safetensors" for n in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    sizes = [path.stat().st_size for path in (one, other)]  # also where both are of one size
    edit_manifest(cache, lambda m: [shard.update(bytes=size) for shard, size in zip(m["shards"], sizes, strict=False)])
    with pytest.raises(UserError, match="holds shard 1, expected shard 0 of this one"):
        train(tmp_path, cache)


def test_a_shard_of_another_cache(cache, tmp_path):
    other = cache_of(tmp_path / "other", tiny_llama(seed=2), shard_bytes=6000)
    shutil.copy(other / "states-00000.safetensors", cache)
    with pytest.raises(UserError, match="holds shard 0 of another cache"):
        train(tmp_path, cache)


def test_swapped_rows_inside_a_shard(cache):
    """Two rows of one length: their states are whole, and each other's."""
    path = cache / "states-00000.safetensors"
    opened = StateCache(cache)
    same = [
        (a, b) for a in range(5) for b in range(a) if opened.labels(a) == opened.labels(b) and a < opened._firsts[1]
    ]
    if not same:
        same = [(0, 0)]
    (a, b), content = same[0], path.read_bytes()
    one, other = opened.row(a).numpy().tobytes(), opened.row(b).numpy().tobytes()
    size = min(len(one), len(other))
    path.write_bytes(content.replace(one[:size], other[:size]) if a != b else content.replace(one, one[::-1]))
    with pytest.raises(UserError, match="is not as it was written"):
        StateCache(cache).row(a)


@pytest.mark.parametrize("name", [HEAD, INDEX])
def test_a_flipped_bit_in_head_or_index(cache, name):
    flip(cache / name)
    with pytest.raises(UserError, match=rf"{name}: is not as it was written"):
        CachedTeacher(cache)


def replace_file(cache, name, tensors):
    """A file, and its checksum in the manifest: what no checksum of files can find."""
    save_file(tensors, cache / name)
    edit_manifest(cache, lambda manifest: manifest["files"].update({name: file_sha256(cache / name)}))


def test_another_head(cache):
    replace_file(cache, HEAD, {"weight": tiny_llama(seed=9).lm_head.weight.detach().clone()})
    with pytest.raises(UserError, match="another head than that of the teacher: weight of the head"):
        CachedTeacher(cache)


def test_a_head_that_nobody_has_written_down_fails_the_self_test(cache, tmp_path):
    other = tiny_llama(seed=9).lm_head.weight.detach().clone()
    replace_file(cache, HEAD, {"weight": other})
    from dts_hf.models.head import Head
    from dts_hf.teachers.identity import head_facts

    edit_manifest(cache, lambda manifest: manifest["identity"].update(head_facts(Head(other))))
    with pytest.raises(UserError, match="self-test failed"):
        train(tmp_path, cache)


def test_another_tokenizer(cache, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(UserError, match="another tokenizer than the rows that were cached: tokenizer's vocabulary"):
        train(tmp_path, cache, processing_class=tokenizer)


def test_another_template(cache, tmp_path):
    with pytest.raises(UserError, match=r"16 of 16 rows are not in the cache .*prompt template.*with other tokens"):
        train(tmp_path, cache, prompt_template="alpaca")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper")
    with pytest.raises(UserError, match=r"prompt template: chat xxh3.* in the cache, chat xxh3.* here"):
        train(tmp_path, cache, processing_class=tokenizer)


def test_rows_that_are_not_there(cache, tmp_path):
    more = [*ROWS, {"id": "new", "instruction": "Say more", "input": "", "output": "more"}]
    with pytest.raises(UserError, match=r"train_dataset: 1 of 17 rows are not in the cache .*'new'"):
        train(tmp_path, cache, train_dataset=more)
    with pytest.raises(UserError, match=r"eval_dataset: 1 of 1 rows"):
        train(tmp_path, cache, eval_dataset=more[-1:])


def test_another_width(cache, tmp_path):
    with pytest.raises(UserError, match="vocab_alignment: strict"):
        train(tmp_path, cache, model=tiny_llama(vocab=352))
    with pytest.raises(UserError, match="vocab_alignment: got"):
        train(tmp_path, cache, vocab_alignment="sloppy")
    train(tmp_path, cache, model=tiny_llama(vocab=352), vocab_alignment="truncate_to_tokenizer")


def test_what_cannot_bring_states(cache, tmp_path):
    with pytest.raises(UserError, match="data_collator: got one beside a cached teacher"):
        train(tmp_path, cache, data_collator=lambda rows: rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format=2), "format 2, expected 1"),
        (lambda m: m["identity"].update(states="pre_norm"), "its states are 'pre_norm', expected 'post_norm'"),
        (lambda m: m.update(dtype="int4"), "dtype: got 'int4'"),
        (lambda m: m.pop("labels"), "is no manifest.*labels.*required"),
        (lambda m: m.update(files={}), "files: got none"),
        (lambda m: m.update(shards=["x"]), r"shards\.0: got 'x'"),
        (lambda m: m.update(shards=[]), "shards: got"),
        (lambda m: m["shards"][0].update(bytes="x"), r"shards\.0\.bytes: got 'x'"),
        (lambda m: m["shards"][0].update(rows=-5), r"shards\.0\.rows: got -5"),
        (lambda m: m["shards"][0].update(rows=10**30), r"shards\.0\.rows"),
        (lambda m: m["shards"][0].pop("file"), r"shards\.0\.file"),
        (lambda m: m.update(rows=10**12), "rows: got 1,000,000,000,000, and the shards have 16 together"),
        (lambda m: m.update(labels=1), "labels: got 1, and the shards"),
        (lambda m: m.update(data=None), "data: got None"),
        (lambda m: m.update(compact=[]), "compact: got"),
        (lambda m: m.update(identity=[]), "identity: got"),
        (lambda m: m.update(extra=1), "extra: got 1"),
        (lambda m: m["identity"].update(logit_scale=None), "logit_scale: got None"),
        (lambda m: m["identity"].update(logit_scale=0), "logit_scale: got 0"),
        (lambda m: m["identity"].update(softcap="x"), "softcap: got 'x'"),
        (lambda m: m["identity"].update(model={"a": 1}), "model: got"),
        (lambda m: m["identity"].update(vocab_size=10**9), "vocab_size: got 1,000,000,000"),
    ],
)
def test_manifests_of_others(cache, change, said):
    edit_manifest(cache, change)
    with pytest.raises(UserError, match=said):
        StateCache(cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shards_of_another_type_than_the_manifest_says(cache, tmp_path, dtype):
    edit_manifest(cache, lambda manifest: manifest.update(dtype=dtype))
    with pytest.raises(UserError, match=r"states-00000\.safetensors: states: got F32 .*, expected (BF16|I8) "):
        train(tmp_path, cache)


def test_an_index_that_does_not_go_with_the_shards(cache):
    index = load_file(cache / INDEX)
    replace_file(cache, INDEX, {**index, "offsets": index["offsets"] + 1})
    with pytest.raises(UserError, match=r"index\.safetensors: other labels than those of the shards"):
        StateCache(cache)
    replace_file(cache, INDEX, {name: tensor for name, tensor in index.items() if name != "order"})
    with pytest.raises(UserError, match=r"index\.safetensors: order: got nothing, expected \[16\]"):
        StateCache(cache)


def test_a_manifest_that_somebody_has_changed(cache):
    path = cache / MANIFEST
    path.write_text(path.read_text().replace('"nll": ', '"nll": 1'))
    with pytest.raises(UserError, match=r"manifest\.json: is not as it was written, going by its own checksum"):
        StateCache(cache)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no manifest"):
        StateCache(cache)


def test_an_unfinished_cache(cache, tmp_path):
    (cache / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"and no manifest\.json, so it is unfinished"):
        StateCache(cache)
    with pytest.raises(UserError, match="no such folder"):
        StateCache(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------- writing


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_are_a_function_of_the_rows():
    assert shard_ranges([3, 0, 5, 1], 10, 40) == [range(0, 3), range(3, 4)]
    assert shard_ranges([3], 10, 1) == [range(0, 1)]
    assert sum(map(len, shard_ranges([1] * 1000, 8, 100)), 0) == 1000


def test_a_broken_or_missing_shard_is_written_again(cache, made):
    before = contents(cache)
    (cache / MANIFEST).unlink()
    (cache / "states-00000.safetensors").write_bytes(b"half")
    (cache / "states-00001.safetensors").unlink()
    flip(cache / "states-00002.safetensors", 2000)
    (cache / ".states-00003.safetensors.1-2.tmp").write_bytes(b"killed")
    cache_of(cache, tiny_llama(seed=1), shard_bytes=6000)
    assert contents(cache) == before == contents(made)


def test_another_cache_is_not_written_into(cache):
    with pytest.raises(UserError, match="holds shards of another cache"):
        cache_of(cache, tiny_llama(seed=2), shard_bytes=6000)


def test_keys_are_of_tokens_and_labels():
    row = ([1, 2, 3, 4], [-100, -100, 3, 4])
    keys = {
        row_key(*row),
        row_key([1, 2, 3, 5], row[1]),
        row_key(row[0], [-100, 2, 3, 4]),
        row_key([1, 2, 3], [-100, -100, 3]),
    }
    assert len(keys) == 4
    assert row_key(row[0], [1, -100, 3, 4]) == row_key(*row)  # nothing predicts the first token: packing hides it


def test_what_cannot_be_cached():
    from dts_hf.data.chat_templates import get_template
    from dts_hf.teachers.identity import identity_of

    identity = identity_of(tiny_llama(), tiny_tokenizer(), get_template("chat"), name="t")
    silent = Rows([{"input_ids": [1, 2], "labels": [-100, -100], "row_id": 0}], ["a"])
    with pytest.raises(UserError, match="no row has a label"):
        make_plan(silent, identity)
    with pytest.raises(UserError, match="dtype: got 'float16', expected one of float32, bfloat16, int8"):
        make_plan(Rows(encoded(), encoded().row_ids), identity, "float16")
    plan = make_plan(Rows(encoded(), encoded().row_ids), identity)
    assert plan.digest() != dataclasses.replace(plan, dtype="int8").digest()
    assert torch.tensor(plan.counts).sum() == sum(encoded().target_counts)


def test_the_first_batches_of_a_stream_are_tested(cache, tmp_path):
    """Nobody could look at its rows before: states of another scale than the head's end the run before its first step."""
    streamed = {"train_dataset": as_stream(ROWS), "max_length": 128, "max_prompt_length": 64}
    train(tmp_path, cache, **streamed)
    edit_manifest(cache, lambda manifest: manifest["identity"].update(logit_scale=2.0))
    trainer = trainer_for(tmp_path / "run", teacher=CachedTeacher(cache), **streamed)
    with pytest.raises(UserError, match="states: the self-test failed: label log-probabilities of"):
        trainer.train()
    assert trainer.state.global_step == 0

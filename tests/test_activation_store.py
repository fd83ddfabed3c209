"""What is stored is what the model computes, for the right token; a harvest survives a kill, a full disk, damage."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_utils import artifacts
from interp_utils import harvest as harvest_module
from interp_utils.activation_store import ActivationStore
from interp_utils.errors import InterpError
from interp_utils.harvest import harvest
from interp_utils.recorder import OUTLIER
from interp_utils.shards import decode_int8, encode_int8, row_numbers
from interp_utils.sites import Site, blocks, body_in, check_site, forward_to
from interp_utils.windows import draw_windows, start_token
from tests.conftest import load
from tests.families import raw_model
from tests.oracle import relative

SITES = ("mlp_in.1", "mlp_out.1", "resid_post.0", "resid_post.1")
ROOT = Path(__file__).resolve().parent.parent


def documents(n: int, seed: int) -> list[str]:
    """Texts of 2 to 60 words."""
    draw = random.Random(seed)
    words = "the cat sat on mat dog x y z rain wind".split()
    return [" ".join(draw.choices(words, k=draw.randint(2, 60))) for _ in range(n)]


CORPORA = {"one": documents(70, 1), "two": documents(70, 2)}
OPTIONS: dict[str, Any] = {
    "sites": ["resid_post.1"],
    "tokens": 2_000,
    "context": 40,
    "batch_size": 4,
    "compute": "float32",
    "shard_tokens": 500,
    "progress": False,
}


unchecked = getattr(harvest, "__wrapped__", harvest)  # by the tests' runtime types


def run(model: Any, folder: Path, corpora: Any = CORPORA, **changes: Any) -> ActivationStore:
    return harvest(model, corpora, folder, **{**OPTIONS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@pytest.fixture(scope="module")
def store(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return run(tiny_model("llama"), tmp_path_factory.mktemp("store"))


def expected(raw: Any, ids: list[int]) -> dict[str, Tensor]:
    """The activations of one window by plain hooks on plain transformers, "pos d"."""
    seen: dict[str, Tensor] = {}
    handles = []
    for layer, block in enumerate(blocks(raw.base_model)):
        norm = getattr(block, "post_feedforward_layernorm", block.mlp)
        before = [
            module
            for name, module in block.named_children()
            if name in ("pre_feedforward_layernorm", "ln_2")
            or (name == "post_attention_layernorm" and not hasattr(block, "pre_feedforward_layernorm"))
        ]
        for kind, module in (("mlp_in", before[0]), ("mlp_out", norm), ("resid_post", block)):

            def keep(_m: Any, _a: Any, out: Any, name: str = f"{kind}.{layer}") -> None:
                seen[name] = (out if isinstance(out, Tensor) else out[0])[0]

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        raw(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_sites(family: str, model: Any, tiny_folder: Callable[[str], Path]) -> None:
    sites = [check_site(model, name) for name in SITES]
    rows = [[2, *range(30, 50)], [2, *range(60, 68)]]
    padded = torch.tensor([row + [0] * (21 - len(row)) for row in rows])
    found = forward_to(body_in(model, torch.float32), sites, padded)
    raw = raw_model(tiny_folder(family))
    for row, ids in enumerate(rows):
        plain = expected(raw, ids)
        for site in sites:
            assert relative(found[site][row, : len(ids)], plain[str(site)]) < 1e-5
    if family != "gpt_neox":  # there the MLP does not read what attention adds
        stream = {name: found[check_site(model, name)] for name in SITES}
        body = body_in(model, torch.float32)
        block, between = blocks(body)[1], {}
        norm = block.pre_feedforward_layernorm if family == "gemma3" else None
        norm = norm or (block.ln_2 if family == "gpt2" else block.post_attention_layernorm)
        handle = norm.register_forward_pre_hook(lambda _m, args: between.update(resid=args[0]))
        forward_to(body, sites, padded)
        handle.remove()
        torch.testing.assert_close(between["resid"] + stream["mlp_out.1"], stream["resid_post.1"])


def test_forward_ends_after_the_last_site_and_leaves_no_hook(llama: Any) -> None:
    body, reached = body_in(llama, torch.float32), []
    handle = blocks(body)[2].register_forward_hook(lambda *_: reached.append(2))
    forward_to(body, [Site("resid_post", 1)], torch.tensor([[2, 3, 4]]))
    assert not reached
    forward_to(body, [Site("resid_post", 2)], torch.tensor([[2, 3, 4]]))
    assert reached == [2]
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in blocks(body).modules())


def test_other_precision_is_a_copy_with_the_same_buffers(llama: Any) -> None:
    body = body_in(llama, torch.bfloat16)
    assert body is not llama._module.base_model
    assert {p.dtype for p in body.parameters()} == {torch.bfloat16}
    for (name, mine), (_, theirs) in zip(
        body.named_buffers(), llama._module.base_model.named_buffers(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert {p.dtype for p in llama._module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("resid_pre.1", "no site 'resid_pre.1'.*resid_post"),
        ("resid_post", "no site 'resid_post'"),
        ("resid_post.9", "Layer 9 is out of range.*0 to 3"),
    ],
)
def test_unknown_site(llama: Any, site: str, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        check_site(llama, site)


def test_negative_layer(llama: Any) -> None:
    assert str(check_site(llama, "mlp_in.-1")) == "mlp_in.3"


def test_windows(llama: Any) -> None:
    windows = draw_windows(llama, CORPORA, 2_000, context=40, seed=0)
    texts = list(CORPORA.values())
    for window in windows:
        ids = llama.tokenizer(texts[window.source][window.document], add_special_tokens=False).input_ids
        assert window.position % 39 == 0
        assert window.ids.tolist() == ids[window.position : window.position + 39]
        assert 16 <= len(window.ids) <= 39
    places = [(w.source, w.document, w.position) for w in windows]
    assert len(set(places)) == len(places)
    assert 2_000 <= sum(len(w.ids) for w in windows) < 2_000 + 39
    again = draw_windows(llama, CORPORA, 2_000, context=40, seed=0)
    assert [(w.source, w.document, w.position) for w in again] == places
    other = draw_windows(llama, CORPORA, 2_000, context=40, seed=1)
    assert [(w.source, w.document, w.position) for w in other] != places


def test_a_shorter_draw_is_the_beginning_of_a_longer_one(llama: Any) -> None:
    draws = [draw_windows(llama, CORPORA, {"one": n, "two": 2 * n}, context=40, seed=0) for n in (300, 1_000)]
    short, long = ([(w.source, w.document, w.position) for w in draw] for draw in draws)
    assert short == long[: len(short)] and len(short) < len(long) / 2


def tokens_by_source(windows: list[Any]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for window in windows:
        counts[window.source] += len(window.ids)
    return counts


def test_tokens_are_shared_evenly_and_mixed(llama: Any) -> None:
    windows = draw_windows(llama, CORPORA, 3_000, context=40, seed=0)
    counts = tokens_by_source(windows)
    assert abs(counts[0] - counts[1]) < 40
    first = tokens_by_source(windows[: len(windows) // 2])
    assert abs(first[0] - first[1]) < 80
    small = {"one": CORPORA["one"][:4], "two": CORPORA["two"]}  # the rest comes from the other
    most = tokens_by_source(draw_windows(llama, {"one": small["one"]}, {"one": 1}, context=40, seed=0))
    counts = tokens_by_source(draw_windows(llama, small, 3_000, context=40, seed=0))
    assert sum(counts.values()) >= 3_000 and most[0] <= counts[0] < 800


def test_tokens_by_source(llama: Any) -> None:
    counts = tokens_by_source(draw_windows(llama, CORPORA, {"one": 400, "two": 1_200}, context=40, seed=0))
    assert 400 <= counts[0] < 440 and 1_200 <= counts[1] < 1_240


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (10**6, r"have only [\d,]+ tokens.*fewer than 1,000,000"),
        ({"one": 10**6, "two": 10}, r"'one' has only [\d,]+ tokens, not 1,000,000"),
        ({"one": 10}, r"\['one'\] but corpora has \['one', 'two'\]"),
        (0, "No tokens were asked for"),
    ],
)
def test_too_many_tokens(llama: Any, tokens: Any, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        draw_windows(llama, CORPORA, tokens, context=40, seed=0)


class Tokenizer:
    """Puts `first` before every text, if there is one."""

    def __init__(self, first: list[int], bos: int | None, vocab: dict[str, int]) -> None:
        self.first, self.bos_token_id, self.vocab = first, bos, vocab

    def __call__(self, _text: str) -> Any:
        return SimpleNamespace(input_ids=[*self.first, 9])

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def test_start_token() -> None:
    def first(*about: Any) -> int:
        return start_token(SimpleNamespace(tokenizer=Tokenizer(*about)))  # type: ignore[arg-type]

    assert first([2], 2, {"<|endoftext|>": 0}) == 2
    assert first([], 1, {"<|endoftext|>": 0}) == 0
    assert first([], 1, {}) == 1
    with pytest.raises(InterpError, match="no token that begins a text"):
        first([], None, {})


def test_rows_are_those_of_their_tokens(store: ActivationStore, llama: Any, tiny_folder: Any) -> None:
    """Every tenth row against a plain forward of its window: the token, and its activation to a bfloat16."""
    texts, raw = list(CORPORA.values()), raw_model(tiny_folder("llama"))
    assert store.source_names == ["one", "two"]
    assert len(store) == len(store.token_ids) == store.card["n_rows"]
    for row in range(0, len(store), 10):
        document, position = int(store.document[row]), int(store.position[row])
        ids = llama.tokenizer(texts[store.source[row]][document], add_special_tokens=False).input_ids
        assert ids[position] == store.token_ids[row]
        begin = position // 39 * 39
        plain = expected(raw, [store.card["start_token"], *ids[begin : position + 1]])
        found = store.read([row], normalised=False)[0]
        torch.testing.assert_close(found, plain["resid_post.1"][-1], rtol=2**-8, atol=1e-5)
        tokens, at = store.tokens_around(row, before=5, after=4)
        assert tokens == ids[max(begin, position - 5) : min(begin + 39, position + 5)]
        assert tokens[at] == ids[position]


def test_masks(store: ActivationStore) -> None:
    mask = store.source == 1
    some = mask.nonzero()[:, 0]
    assert 1 < len(some) < len(store)
    assert torch.equal(store.read(mask), store.read(some))
    assert torch.equal(store.read(mask.tolist()), store.read(some))


@pytest.mark.parametrize(
    "rows", [torch.ones(9, dtype=torch.bool), torch.ones(0, dtype=torch.bool), torch.ones(2)]
)
def test_rows_are_numbers_or_a_mask(rows: Tensor) -> None:
    with pytest.raises(
        InterpError, match=rf"whole numbers or a mask of all 10; {len(rows)} of {rows.dtype} were"
    ):
        row_numbers(rows, 10)


def test_row_out_of_range(store: ActivationStore) -> None:
    for row in (-1, len(store)):
        with pytest.raises(
            InterpError, match=f"row is out of range; this store has rows 0 to {len(store) - 1:,}"
        ):
            store.read([row])
        with pytest.raises(InterpError, match="row is out of range"):
            store.tokens_around(row)


@pytest.mark.parametrize("rows", ["bfloat16", "int8"])
def test_normalised(llama: Any, tmp_path: Path, rows: Any) -> None:
    store = run(llama, tmp_path, rows=rows, sites=["resid_post.1", "mlp_in.2"])
    for site in store.sites:
        x = store.read(slice(None), site).double()
        assert x.shape == (len(store), 32) == (len(store), store.d(site))
        assert float(x.square().sum(-1).mean()) == pytest.approx(32, rel=1e-5)
        assert float(x.mean(0).abs().max()) < 1e-5
        raw = store.read(slice(None), site, normalised=False).double()
        torch.testing.assert_close(x, (raw - store.mean[site]) * store.scale[site], rtol=1e-4, atol=1e-4)


def test_int8_keeps_small_dimensions_beside_massive_ones() -> None:
    std = torch.logspace(-2, 3, 64)
    rows = torch.randn(4_000, 64, generator=torch.Generator().manual_seed(0)) * std + 5 * std
    work = rows.clone()
    kept = decode_int8(*encode_int8(work, 5 * std, std), 5 * std, std)
    torch.testing.assert_close(work, kept - 5 * std, rtol=1e-5, atol=1e-3)
    assert float(((kept - rows).square().mean(0) / std**2).max()) < 2e-4


def test_outliers_are_dropped_at_all_sites(tiny_folder: Any, tmp_path: Path) -> None:
    model = load(tiny_folder("llama"))
    word = model.tokenizer(" dog", add_special_tokens=False).input_ids[-1]
    with torch.no_grad():
        model._module.base_model.embed_tokens.weight[word] *= 1_000
    store = run(model, tmp_path, sites=["mlp_in.1", "resid_post.1"])
    windows = draw_windows(model, CORPORA, 2_000, context=40, seed=0)
    ids = np.concatenate([window.ids for window in windows])
    assert 0 < (ids == word).sum() == store.card["n_dropped"] == len(ids) - len(store)
    assert word not in store.token_ids
    norms = store.read(slice(None), "resid_post.1", normalised=False).norm(dim=-1)
    assert float(norms.max() / norms.median()) < OUTLIER
    beside = next(row for row in range(len(store)) if word in store.tokens_around(row, 2, 2)[0])
    text = list(CORPORA.values())[store.source[beside]][store.document[beside]]
    whole = model.tokenizer(text, add_special_tokens=False).input_ids
    tokens, at = store.tokens_around(beside, 2, 2)
    position = int(store.position[beside])
    assert tokens == whole[position - at : position - at + len(tokens)]


def test_batches(store: ActivationStore) -> None:
    everything = Counter(row.numpy().tobytes() for row in store.read(slice(None)))
    batches = list(store.batches(256, seed=3, epochs=2))
    per_epoch = len(store) // 256
    assert len(batches) == 2 * per_epoch and all(batch.shape == (256, 32) for batch in batches)
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        found = Counter(row.numpy().tobytes() for batch in epoch for row in batch)
        assert found <= everything and found.total() == per_epoch * 256 > everything.total() - 256
    assert not torch.equal(batches[0], batches[per_epoch])
    resumed = list(store.batches(256, seed=3, epochs=2, start=5))
    assert all(torch.equal(a, b) for a, b in zip(batches[5:], resumed, strict=True))
    assert not torch.equal(next(store.batches(256, seed=4)), batches[0])


def test_ranks_share_a_batch(store: ActivationStore) -> None:
    whole = next(store.batches(64, seed=0))
    parts = torch.cat([next(store.batches(64, seed=0, rank=rank, world=2)) for rank in (0, 1)])
    assert torch.equal(whole.sum(-1).sort().values, parts.sum(-1).sort().values)


def test_pairs_are_of_the_same_rows(llama: Any, tmp_path: Path) -> None:
    store = run(llama, tmp_path, sites=["mlp_out.1", "mlp_in.1"])
    assert store.sites == ["mlp_in.1", "mlp_out.1"]
    x, y = next(store.batches(128, seed=0, site=("mlp_in.1", "mlp_out.1")))
    one, other = (next(store.batches(128, seed=0, site=site)) for site in store.sites)
    assert torch.equal(x, one) and torch.equal(y, other) and not torch.equal(x, y)
    with pytest.raises(InterpError, match=r"several sites; say which: mlp_in\.1, mlp_out\.1"):
        store.batches(128, seed=0)
    with pytest.raises(InterpError, match=r"no site 'mlp_in\.2'.*'mlp_in\.1'"):
        store.read([0], "mlp_in.2")


def test_bad_batches(store: ActivationStore) -> None:
    with pytest.raises(InterpError, match="batch_size=9,999 is out of range"):
        store.batches(9_999, seed=0)
    with pytest.raises(InterpError, match="batch of 65 cannot be shared by rank 0 of 2"):
        store.batches(65, seed=0, world=2)
    assert store.read([]).shape == (0, 32)


def test_held_out_is_normalised_as_the_training(
    llama: Any, store: ActivationStore, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    held = run(llama, tmp_path / "held", {"one": documents(20, 3)}, tokens=500)
    alike = held.like(store)
    raw = held.read([3, 1], normalised=False)
    expect = (raw - store.mean["resid_post.1"].float()) * store.scale["resid_post.1"]
    torch.testing.assert_close(alike.read([3, 1]), expect)
    assert not torch.allclose(held.read([3, 1]), expect)
    elsewhere = run(llama, tmp_path / "elsewhere", sites=["resid_post.2"])
    foreign = run(tiny_model("gpt2"), tmp_path / "foreign")
    for other in (elsewhere, foreign):
        with pytest.raises(InterpError, match="of another model or lacks sites"):
            other.like(store)


@pytest.mark.parametrize("changes", [{"sites": ["resid_post.2"]}, {"seed": 1}, {"tokens": 1_000}])
def test_folder_of_another_harvest(llama: Any, store: ActivationStore, changes: dict[str, Any]) -> None:
    with pytest.raises(InterpError, match=f"another {next(iter(changes))}; choose another folder"):
        run(llama, store.folder, **changes)


def test_folder_of_another_model_or_corpus(
    llama: Any, store: ActivationStore, tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(InterpError, match="another model, weights"):
        run(tiny_model("gpt2"), store.folder)
    with pytest.raises(InterpError, match="another sources; choose"):
        run(llama, store.folder, {"one": CORPORA["one"], "two": documents(40, 3)})
    with pytest.raises(InterpError, match="another order of the sources; choose"):
        run(llama, store.folder, dict(reversed(CORPORA.items())))


def test_finished_harvest_is_only_opened(
    llama: Any, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest_module, "draw_windows", None)
    assert len(run(llama, store.folder)) == len(store)


KILLED = """
import json, os, signal, sys
from interp_utils.harvest import harvest
from interp_utils.models import load_model
from interp_utils.shards import ShardFiles
append, calls = ShardFiles.append, []
def fatal(self, what, values):
    append(self, what, values)
    calls.append(what)
    if self.index == 2 and len(calls) % 7 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
ShardFiles.append = fatal
model, folder, corpora, options = json.loads(sys.argv[1])
harvest(load_model(model), corpora, folder, **options)
"""


@pytest.mark.parametrize("rows", ["bfloat16", "int8"])
def test_killed_harvest_goes_on(llama: Any, tiny_folder: Any, tmp_path: Path, rows: Any) -> None:
    folder, whole = tmp_path / "killed", run(llama, tmp_path / "whole", rows=rows)
    work = json.dumps([str(tiny_folder("llama")), str(folder), CORPORA, {**OPTIONS, "rows": rows}])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, work]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert list(folder.glob(".00002.*.tmp")) and not (folder / "00002.json").exists()
    with pytest.raises(InterpError, match="not finished"):
        ActivationStore(folder)
    kept = (folder / "00001.resid_post.1.bin").stat().st_mtime_ns
    run(llama, folder, rows=rows)
    assert contents(folder) == contents(whole.folder)
    assert (folder / "00001.resid_post.1.bin").stat().st_mtime_ns == kept


def test_truncated_shard(llama: Any, store: ActivationStore, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    os.truncate(folder / "00001.resid_post.1.bin", 1_000)
    with pytest.raises(
        InterpError, match=r"00001.resid_post.1.bin has 1,000 bytes instead of .*harvest again"
    ):
        ActivationStore(folder)
    run(llama, folder)
    assert contents(folder) == contents(store.folder)


def test_changed_byte(store: ActivationStore, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    store.verify()
    with (folder / "00001.resid_post.1.bin").open("r+b") as file:
        file.write(b"\x01")
    with pytest.raises(InterpError, match=r"00001.resid_post.1.bin has another sha256"):
        ActivationStore(folder).verify()


def turn_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["moments.safetensors", "pilot.safetensors"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 100), turn_last_byte])
def test_damaged_moments_and_pilot(
    llama: Any, store: ActivationStore, tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    opened = ActivationStore(folder)
    spoil(folder / name)
    for look in (opened.verify, lambda: ActivationStore(folder)):
        with pytest.raises(InterpError, match=f"{name} is missing or damaged; run its harvest again"):
            look()
    run(llama, folder).verify()
    assert contents(folder) == contents(store.folder)


@pytest.mark.parametrize("finished", [True, False])
def test_pilot_that_cannot_be_made_again(
    llama: Any, store: ActivationStore, tmp_path: Path, finished: bool
) -> None:
    """The one that comes out is another than the card's, or there is no card yet to compare it with."""
    folder = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    (folder / "pilot.safetensors").unlink()
    card = folder / "card.json"
    if finished:
        card.write_text(card.read_text().replace(store.card["sha256"]["pilot.safetensors"], "0" * 64))
    else:
        card.unlink()
    for _ in range(2):
        with pytest.raises(InterpError, match=r"pilot.safetensors is missing or damaged.*delete the folder"):
            run(llama, folder)
    assert not (folder / "pilot.safetensors").exists()


def test_card_without_hashes(llama: Any, store: ActivationStore, tmp_path: Path) -> None:
    """Of a store that was made before cards had them."""
    folder = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    older = {key: value for key, value in store.card.items() if key != "sha256"}
    (folder / "card.json").write_text(json.dumps(older))
    run(llama, folder).verify()
    assert json.loads((folder / "card.json").read_text()) == older
    os.truncate(folder / "moments.safetensors", 100)
    with pytest.raises(InterpError, match=r"moments.safetensors is missing or damaged"):
        ActivationStore(folder)
    run(llama, folder)
    assert contents(folder) == contents(store.folder)


def test_disk_fills(llama: Any, store: ActivationStore, tmp_path: Path) -> None:
    """A real refusal of the system: no file of this process may grow beyond some size, for a while."""
    rows = json.loads((store.folder / "00000.json").read_text())["rows"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((rows - 5) * 64, limits[1]))
    try:
        with pytest.raises(InterpError, match="filled up; the finished shards are kept: free some space"):
            run(llama, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob(".*.tmp"))
    run(llama, tmp_path)
    assert contents(tmp_path) == contents(store.folder)


def test_disk_is_too_small(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest_module, "Recorder", None)  # no work before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(InterpError, match=r"needs 0\.0 GB .* 0\.0 GB are free"):
        run(llama, tmp_path)


def test_two_processes(llama: Any, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(InterpError, match="Another process is writing"):
        run(llama, tmp_path)


def test_folder_is_a_file(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InterpError, match="cannot be written"):
        run(llama, tmp_path / "file" / "folder")


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (0.0, "constant")])
def test_broken_activations(tiny_folder: Any, tmp_path: Path, value: float, message: str) -> None:
    model = load(tiny_folder("llama"))
    with torch.no_grad():
        model._module.base_model.embed_tokens.weight.fill_(value)
    with pytest.raises(InterpError, match=f"activations at resid_post.1 are {message}"):
        run(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, "give at least one"),
        ({"sites": "resid_post.1"}, "sites is a list"),
        ({"context": 65}, "context=65 is out of range; this model takes 17 to 64"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_tokens": 0}, "shard_tokens=0 is too small"),
        ({"corpora": {str(n): ["text"] for n in range(129)}}, "129 sources; a store takes at most 128"),
        ({"compute": "float64"}, "compute='float64'"),
        ({"rows": "int4"}, "rows='int4'"),
        ({"corpora": {"one": []}}, "'one' has no documents"),
        ({"corpora": {}}, "no source"),
    ],
)
def test_bad_arguments(llama: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    options = {**OPTIONS, "corpora": CORPORA, **changes}
    with pytest.raises(InterpError, match=message):
        unchecked(llama, options.pop("corpora"), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tokens", [np.int64(600), {"one": np.int64(300), "two": np.int32(300)}])
def test_tokens_as_numpy_counts_them(llama: Any, tmp_path: Path, tokens: Any) -> None:
    store = unchecked(llama, CORPORA, tmp_path, **{**OPTIONS, "tokens": tokens})
    assert store.card["tokens"] == tokens and len(store) >= 600


def test_each_mix_has_its_folder(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []

    @functools.wraps(harvest)
    def recorded(_model: Any, _corpora: Any, folder: Path, **_options: Any) -> ActivationStore:
        names.append(folder.name)
        return store

    def made(weights: str = "local:" + 50 * "a", text: str = "rain", **options: Any) -> None:
        monkeypatch.setattr(artifacts, "load_corpus", lambda name: [f"{name} {text} {n}" for n in range(50)])
        model = SimpleNamespace(info=SimpleNamespace(name="tiny", weights=weights))
        artifacts.harvest_mix(model, parts=3, **options)  # type: ignore[arg-type]

    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts, "harvest", recorded)
    made(), made(compute="bfloat16", seed=0), made(progress=False)
    assert len(set(names)) == 1
    made(rows="int8"), made(seed=1), made(text="wind"), made("local:b" + 49 * "a")
    assert len(set(names)) == 5


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="no harvested activations"):
        ActivationStore(tmp_path)


def test_remote(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="on this machine"):
        run(tiny_model("llama", remote="local"), tmp_path)


@pytest.mark.model
def test_gemma(gemma: Any, tmp_path: Path) -> None:
    from interp_utils.activations import residual_stream

    text = (
        "The Great Wall is in the country whose capital is Beijing, and the Eiffel Tower is in Paris, France."
    )
    options: dict[str, Any] = {"sites": ["resid_post.9"], "tokens": 16, "progress": False}
    store = harvest(gemma, {"ours": [text]}, tmp_path / "exact", compute="float32", **options)
    expect = residual_stream(gemma, text, layers=[9])[0, 0]
    assert store.card["n_dropped"] == 0 and len(store) == len(expect) - 1
    torch.testing.assert_close(store.read(slice(None), normalised=False), expect[1:], rtol=2**-8, atol=1e-3)
    fast = harvest(gemma, {"ours": [text]}, tmp_path / "fast", **options)
    centred = expect[1:] - expect[1:].mean(0)
    error = fast.read(slice(None), normalised=False) - expect[1:]
    assert float(error.square().sum() / centred.square().sum()) < 0.01


@pytest.mark.model
def test_smollm2_begins_with_its_mark_between_documents(smollm2: Any) -> None:
    assert smollm2.tokenizer.decode([start_token(smollm2)]) == "<|endoftext|>"


def test_iterator_is_lazy(store: ActivationStore) -> None:
    assert len(list(islice(store.batches(16, seed=0, epochs=10**9), 3))) == 3

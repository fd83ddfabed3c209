"""Files of SAELens and Gemma Scope, and the loss of a model whose state a dictionary replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_utils.dictionaries import Dictionary, splice
from interp_utils.dictionaries.exchange import from_gemma_scope, from_saelens, to_saelens
from interp_utils.dictionaries.splice import ce_metrics
from interp_utils.errors import InterpError
from interp_utils.sites import check_site, forward_to
from tests.test_dictionaries import D_IN, KINDS, WIDTH, close, data, made

HOOK = {"model_name": "google/gemma-3-270m", "hook_name": "blocks.9.hook_resid_post"}


def trained(kind: Any) -> Dictionary:
    """A dictionary with units, and a threshold where it has one."""
    dictionary = made(kind)
    if kind == "batchtopk":
        dictionary.set_threshold(torch.tensor(0.4))
    return dictionary.set_units(torch.randn(D_IN, generator=torch.Generator().manual_seed(1)), 0.2)


def as_saelens_computes(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """(activations, reconstruction) by SAELens's own formulas from its files."""
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    pre = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    norms = (
        w["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(len(w["W_dec"]))
    )
    pre = pre * norms
    if config["architecture"] == "topk":
        values, ids = pre.topk(config["k"])
        acts = torch.zeros_like(pre).scatter(1, ids, values.relu())
    else:
        acts = pre.relu() * (pre > w["threshold"] if config["architecture"] == "jumprelu" else 1)
    return acts, acts / norms @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_files_compute_the_same_on_raw_activations(kind: Any, tmp_path: Path) -> None:
    dictionary, x = trained(kind), data(64)
    raw = x / dictionary.scale + dictionary.mean
    to_saelens(tmp_path, dictionary, **HOOK)
    acts, y = as_saelens_computes(tmp_path, raw)
    close(acts, dictionary.encode(x).detach())
    close(y, (dictionary(x) / dictionary.scale + dictionary.mean).detach())
    back = from_saelens(tmp_path)
    close(back.encode(raw).detach(), acts)
    close(back(raw).detach(), y)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes["W_enc"] == (D_IN, WIDTH) and shapes["W_dec"] == (WIDTH, D_IN)


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_itself_reads_them(kind: Any, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")  # not among our packages: run this test where it is installed
    dictionary, x = trained(kind), data(64)
    raw = x / dictionary.scale + dictionary.mean
    to_saelens(tmp_path / "ours", dictionary, **HOOK)
    sae = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    close(sae.encode(raw).detach(), dictionary.encode(x).detach())
    close(sae(raw).detach(), (dictionary(x) / dictionary.scale + dictionary.mean).detach())
    sae.save_inference_model(tmp_path / "theirs") if hasattr(sae, "save_inference_model") else sae.save_model(
        tmp_path / "theirs"
    )
    close(from_saelens(tmp_path / "theirs")(raw).detach(), sae(raw).detach())


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_what_saelens_subtracts_and_divides_by_is_folded(architecture: str, tmp_path: Path) -> None:
    generator, x = torch.Generator().manual_seed(0), data(64)
    shapes = {"W_enc": (D_IN, WIDTH), "b_enc": (WIDTH,), "W_dec": (WIDTH, D_IN), "b_dec": (D_IN,)}
    save_file(
        {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()},
        tmp_path / "sae_weights.safetensors",
    )
    config: dict[str, Any] = {"architecture": architecture, "apply_b_dec_to_input": True}
    config["metadata"] = {"sae_lens_version": "6.54.12"}
    if architecture == "topk":
        config |= {"k": 5, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    acts, y = as_saelens_computes(tmp_path, x)
    read = from_saelens(tmp_path)
    close(read.encode(x).detach(), acts)
    close(read(x).detach(), y)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["W_dec"][3] = 0  # a latent that decodes to nothing
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with torch.no_grad():
        read.W_dec[3] = 0
    again = from_saelens(tmp_path)
    assert all(t.isfinite().all() for t in again.state_dict().values()) and not again.W_dec[3].any()
    if architecture == "standard":
        close(again(x).detach(), read(x).detach())


def test_foreign_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="cfg.json with sae_weights.safetensors is missing, damaged or"):
        from_saelens(tmp_path)
    to_saelens(str(tmp_path), trained("topk"), **HOOK)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for change, message in (
        ({"architecture": "gated"}, "cfg.json.*architecture 'gated', but only standard, topk, jumprelu"),
        ({"architecture": "batchtopk"}, "cfg.json.*save it with SAELens's `save_inference_model`"),
        ({"k": None}, "cfg.json.*needs k"),
        ({"metadata": None}, "cfg.json.*before SAELens 6"),
        ({"metadata": "6.1"}, "cfg.json.*damaged"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"metadata": {}}, "before SAELens 6"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InterpError, match=message):
            from_saelens(str(tmp_path))
    for text in ("[]", "{", "null", '"topk"'):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(InterpError, match="cfg.json"):
            from_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if k != "k"}))
    with pytest.raises(InterpError, match="cfg.json.*no 'k'.*save the SAE with SAELens 6"):
        from_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    for weights, message in (
        ({n: t for n, t in tensors.items() if n != "b_enc"}, "sae_weights.*no 'b_enc'"),
        ({**tensors, "b_enc": torch.zeros(3)}, "sae_weights.*b_enc has shape .3,. but .96,. is needed"),
        ({**tensors, "W_dec": torch.zeros(WIDTH)}, "sae_weights"),
    ):
        save_file(weights, tmp_path / "sae_weights.safetensors")
        with pytest.raises(InterpError, match=message):
            from_saelens(tmp_path)
    with pytest.raises(InterpError, match="only autoencoders are exported"):
        to_saelens(tmp_path, made("relu", d_out=8), **HOOK)


def test_gemma_scope_files_are_read(tmp_path: Path) -> None:
    generator, x, file = torch.Generator().manual_seed(0), data(64), tmp_path / "params.safetensors"
    shapes = {"w_enc": (D_IN, WIDTH), "w_dec": (WIDTH, D_IN), "b_enc": (WIDTH,), "b_dec": (D_IN,)}
    w = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    w["threshold"] = torch.rand(WIDTH, generator=generator) * 5
    save_file(w, file)
    pre = x @ w["w_enc"] + w["b_enc"]
    acts = (pre > w["threshold"]) * pre.relu()
    read = from_gemma_scope(file)
    assert (
        read.kind == "jumprelu" and not read.transcoder and from_gemma_scope(file, transcoder=True).transcoder
    )
    close(read.encode(x).detach(), acts)
    close(read(x).detach(), acts @ w["w_dec"] + w["b_dec"])
    save_file({**w, "affine_skip_connection": torch.eye(D_IN)}, file)
    with pytest.raises(InterpError, match="affine_skip_connection"):
        from_gemma_scope(file)
    save_file({**w, "threshold": torch.ones(3)}, file)
    with pytest.raises(InterpError, match="threshold of shape"):
        from_gemma_scope(file)
    save_file({**w, "w_enc": torch.ones(3)}, file)
    for path in (tmp_path / "none", file, str(file)):
        with pytest.raises(
            InterpError, match=f"{Path(path).name} is missing, damaged or .*download it again"
        ):
            from_gemma_scope(path)


def identity(d: int, scale: float = 1.0) -> Dictionary:
    """Reconstructs everything: each dimension's two signs are two latents."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    made = Dictionary("relu", d, 2 * d)
    with torch.no_grad():
        made.W_enc.copy_(both)
        made.W_dec.copy_(both)
    return made.set_units(torch.randn(d, generator=torch.Generator().manual_seed(0)), scale)


def windows(model: Any) -> list[list[int]]:
    ids = model.tokenizer("the cat sat on the mat; the dog, the cat").input_ids
    return [[0, *ids], [0, *ids[3:]], [0, *ids[:6]], [0, 1]]


def test_a_perfect_dictionary_loses_nothing(model: Any) -> None:
    d = model.config.hidden_size
    result = ce_metrics(model, identity(d, 0.3), windows(model), "resid_post.1", batch_size=2)
    lengths = [len(window) - 2 for window in windows(model)[:3]]
    assert result["tokens"] == sum(lengths) and 0.9 < result["replaced_share"] <= 1
    assert result["ce_spliced"] == pytest.approx(result["ce"], abs=1e-5)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["recovered_zero"] == pytest.approx(1, abs=1e-2)


def test_spliced_loss_equals_plain_hooks(llama: Any) -> None:
    """Mean and zero ablation, and a poor dictionary, by a hook written out for one window."""
    d, window = llama.config.hidden_size, windows(llama)[0]
    poor = Dictionary.create("topk", d, 16, k=2).set_units(torch.randn(d), 0.7)
    result = ce_metrics(llama, poor, [window], "resid_post.0")
    ids, raw = torch.tensor([window]), llama._module
    block = raw.model.layers[0]

    def plain(change: Any) -> Tensor:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            state = output if isinstance(output, Tensor) else output[0]
            norms = state[0].norm(dim=-1)
            new = state.clone()
            for p in range(1, len(window)):
                if norms[p] <= 6 * norms[1:].median():
                    new[0, p] = change(state[0, p])
            return new if isinstance(output, Tensor) else (new, *output[1:])

        handle = block.register_forward_hook(hook)
        with torch.no_grad():
            logits = raw(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        return logits

    states: list[Tensor] = []
    plain(lambda x: (states.append(x), x)[1])  # an identity that notes what it is given
    mean = torch.stack(states).mean(0)

    def ce(logs: Tensor) -> float:
        return -float(torch.stack([logs[p, window[p + 1]] for p in range(1, len(window) - 1)]).mean())

    with torch.no_grad():
        runs = {
            "ce": plain(lambda x: x),
            "ce_mean_ablated": plain(lambda x: mean),
            "ce_zero_ablated": plain(lambda x: torch.zeros(d)),
            "ce_spliced": plain(lambda x: poor((x - poor.mean) * 0.7) / 0.7 + poor.mean),
        }
    for name, logs in runs.items():
        assert result[name] == pytest.approx(ce(logs), rel=1e-5), name
    clean, spliced = runs["ce"][1:-1], runs["ce_spliced"][1:-1]
    assert result["kl"] == pytest.approx(float((clean.exp() * (clean - spliced)).sum(-1).mean()), rel=1e-4)
    gap = result["ce_mean_ablated"] - result["ce"]
    assert result["recovered_mean"] == pytest.approx((result["ce_mean_ablated"] - result["ce_spliced"]) / gap)


def test_a_transcoder_replaces_the_mlp(llama: Any) -> None:
    """One that always gives the mean of what it replaces is mean ablation."""
    d = llama.config.hidden_size
    sites = [check_site(llama, name) for name in ("mlp_in.1", "mlp_out.1")]
    rows: list[list[Tensor]] = [[], []]
    for window in windows(llama)[:3]:
        states = forward_to(llama._module.base_model, sites, torch.tensor([window]))
        for own, site in zip(rows, sites, strict=True):
            own.append(states[site][0, 1:])
    x, y = (torch.cat(own) for own in rows)
    usual = x.norm(dim=1) <= 6 * x.norm(dim=1).median()
    constant = Dictionary("relu", d, 4, d_out=d).set_units(torch.zeros(d), 1.0, y[usual].mean(0), 2.0)
    result = ce_metrics(llama, constant, windows(llama), "mlp_in.1")
    assert result["ce_spliced"] == pytest.approx(result["ce_mean_ablated"], rel=1e-6)
    assert result["ce_spliced"] != pytest.approx(result["ce_zero_ablated"], rel=1e-6)
    for site in ("resid_post.1", "mlp_out.1"):
        with pytest.raises(InterpError, match=f"reads its input, not {site}; name the site 'mlp_in.1'"):
            ce_metrics(llama, constant, windows(llama), site)
    wide = Dictionary("relu", d, 4, d_out=d + 1)
    with pytest.raises(InterpError, match=f"Rows at mlp_out.1 are {d} wide but the dictionary gives {d + 1}"):
        ce_metrics(llama, wide, windows(llama), "mlp_in.1")


def test_neither_batches_nor_units_change_the_measures(llama: Any) -> None:
    """A window of other norms in the first batch or the last, and the dictionary that has no units."""
    d, some = llama.config.hidden_size, windows(llama)[:3]
    some.append([0, *[some[0][1]] * 12])
    poor = Dictionary.create("topk", d, 16, k=2).set_units(torch.randn(d), 0.7)
    first = ce_metrics(llama, poor, some, "resid_post.0", batch_size=1)
    orders = [(poor, some[::-1], 1), (poor, some, 8), (poor.raw(), some, 1)]
    for dictionary, own, size in orders:
        other = ce_metrics(llama, dictionary, own, "resid_post.0", batch_size=size)
        for name, value in first.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_outlier_limit_is_that_of_all_windows(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "OUTLIER", 1)  # half of the rows are above it
    d, some = llama.config.hidden_size, windows(llama)[:3]
    shares = [
        ce_metrics(llama, identity(d), own, "resid_post.0", batch_size=1)["replaced_share"]
        for own in (some, some[::-1], some[1:] + some[:1])
    ]
    assert shares[0] == shares[1] == shares[2] == pytest.approx(0.5, abs=0.05)


def test_a_splice_that_cannot_work_is_refused(llama: Any) -> None:
    d = llama.config.hidden_size
    with pytest.raises(InterpError, match="wide but the dictionary reads"):
        ce_metrics(llama, identity(d + 1), windows(llama), "resid_post.0")
    with pytest.raises(InterpError, match="no window of at least three"):
        ce_metrics(llama, identity(d), [[0, 1]], "resid_post.0")
    with pytest.raises(InterpError, match="no site"):
        ce_metrics(llama, identity(d), windows(llama), "resid.0")

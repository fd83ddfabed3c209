"""Dictionaries on disk and their metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from interp_utils.dictionaries import Dictionary
from interp_utils.dictionaries.files import load, save
from interp_utils.dictionaries.metrics import evaluate
from interp_utils.errors import InterpError
from tests.test_dictionaries import D_IN, KINDS, close, data, made


@pytest.mark.parametrize("kind", KINDS)
def test_saved_rows_are_int8_and_come_back(kind: Any, tmp_path: Path) -> None:
    dictionary = made(kind, d_out=16 if kind == "relu" else None)
    if kind == "batchtopk":
        dictionary.set_threshold(torch.tensor(0.4))
    dictionary.set_units(torch.randn(D_IN), 0.5, torch.randn(dictionary.d_out), 0.25)
    save(tmp_path / "one", dictionary, {"seed": 3})
    back, card = load(tmp_path / "one")
    assert card["seed"] == 3 and card["dictionary"]["kind"] == kind == back.kind
    assert back.transcoder == dictionary.transcoder
    for name, tensor in dictionary.state_dict().items():
        other = back.state_dict()[name]
        if name in ("W_enc", "W_dec"):
            step = tensor.abs().amax(dim=1, keepdim=True) / 127
            # half a step of rounding, fp16's own, and what making unit rows of them again adds
            assert ((other - tensor).abs() <= (0.7 if name == "W_dec" else 0.57) * step).all()
        else:
            assert torch.equal(other, tensor), name
    save(tmp_path / "two", back, {"seed": 3})
    again, _ = load(tmp_path / "two")
    close(again.W_enc.detach(), back.W_enc.detach(), 1e-3)
    if kind in ("topk", "batchtopk"):
        torch.testing.assert_close(back.W_dec.norm(dim=1), torch.ones(back.width))
        assert back.normalised().W_dec.equal(back.W_dec)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save(tmp_path, made("topk"), {})
    file = tmp_path / "dictionary.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InterpError, match="does not have the hash of its card"):
        load(tmp_path)
    with pytest.raises(InterpError, match="no dictionary 'nonsense'"):
        load("nonsense")
    broken = made("topk")
    with torch.no_grad():
        broken.W_enc[0, 0] = torch.nan
    with pytest.raises(InterpError, match="W_enc of the dictionary is not finite"):
        save(tmp_path / "other", broken, {})
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InterpError, match="could not be written"):
        save(tmp_path / "file", made("topk"), {})
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["dictionary"]["width"] == made("topk").width
    file.write_bytes(whole)
    advice = "restore both from where they came or train again"
    for text in ("{", "[]", "null", json.dumps({"sha256": card["sha256"]}), json.dumps({"dictionary": {}})):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(InterpError, match=f"card.json is missing, damaged or .*; {advice}"):
            load(tmp_path)
    for change in ({"k": None}, {"width": 7}, {"kind": "top"}, {"kind": "jumprelu", "k": None}):
        shape = {**card["dictionary"], **change}
        (tmp_path / "card.json").write_text(json.dumps({**card, "dictionary": shape}))
        with pytest.raises(InterpError, match="dictionary.safetensors with its card"):
            load(tmp_path)


def test_a_row_of_zeros_counts_as_a_unit_row(tmp_path: Path) -> None:
    for kind in ("topk", "relu"):
        dictionary = made(kind)
        with torch.no_grad():
            dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
            dictionary.W_dec *= 1 + 5e-5 * torch.rand(len(dictionary.W_dec), 1)
            dictionary.W_dec[5] = 0
        unit = dictionary.normalised()
        assert unit.W_dec.isfinite().all() and not unit.W_dec[5].any()
        close(unit(data(20)).detach(), dictionary(data(20)).detach())
        save(str(tmp_path), dictionary, {})
        back, card = load(tmp_path)
        assert card["dictionary"]["unit_rows"] and not back.W_dec[5].any()
        norms = back.W_dec.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.ones(back.width - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_raw_folds_the_units(kind: Any) -> None:
    dictionary, x = made(kind), data(64)
    if kind == "batchtopk":
        dictionary.set_threshold(torch.tensor(0.4))
    mean, scale = 3 * torch.randn(D_IN), 0.05
    raw = dictionary.set_units(mean, scale).raw()
    activations = x / scale + mean
    close(raw.encode(activations).detach(), dictionary.encode(x).detach())
    close(raw(activations).detach(), (dictionary(x) / scale + mean).detach())


def test_metrics_equal_slow_ones() -> None:
    dictionary, x, y = made("topk", d_out=16), data(300), data(300, 16, seed=2) + 0.3
    result = evaluate(dictionary, zip(x.split(70), y.split(70), strict=True))
    y_hat, acts = dictionary(x).detach(), dictionary.encode(x)
    weighted = r2_score(y.numpy(), y_hat.numpy(), multioutput="variance_weighted")
    assert result.explained_variance == pytest.approx(weighted, rel=1e-5)
    assert result.normalised_mse == pytest.approx(
        float((y - y_hat).square().sum() / y.square().sum()), rel=1e-5
    )
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(y, y_hat).mean()), rel=1e-5)
    assert result.l0 == pytest.approx(float((acts > 0).sum() / 300))
    assert result.dead_share == float((~(acts > 0).any(0)).float().mean())
    torch.testing.assert_close(result.density, (acts > 0).float().mean(0))
    fewer = evaluate(dictionary, [(x, y)], without=[2, 5])
    rest = [i for i in range(16) if i not in (2, 5)]
    assert fewer.explained_variance == pytest.approx(
        r2_score(y[:, rest].numpy(), y_hat[:, rest].numpy(), multioutput="variance_weighted"), rel=1e-5
    )
    assert "density" not in result.as_dict() and np.isfinite(list(result.as_dict().values())).all()
    with pytest.raises(InterpError, match="no row"):
        evaluate(dictionary, [])
    one, listed = evaluate(dictionary, (x, y)), evaluate(dictionary, [[x.double(), y.double()]])
    assert one.as_dict() == listed.as_dict() == pytest.approx(result.as_dict(), rel=1e-9)


def test_what_cannot_be_evaluated_is_named() -> None:
    transcoder, sae, x = made("topk", d_out=16), made("topk"), data(40)
    spoiled = x.clone()
    spoiled[3, 2] = torch.inf
    half = torch.full((40, D_IN), 6e4, dtype=torch.float16)
    assert evaluate(sae, half.div(1e4)).rows == 40 and evaluate(sae, half).rows == 40
    for dictionary, batches, message in (
        (transcoder, x, "The data is one tensor, but a transcoder needs its input and its target"),
        (transcoder, [(x, x[:, :16]), x], "Batch 1 is one tensor"),
        (transcoder, (x, x[:30, :16]), r"target of the data has shape \(30, 16\) but \(40, 16\) is needed"),
        (transcoder, (x, x), r"target of the data has shape \(40, 24\) but \(40, 16\)"),
        (sae, x[:, :8], r"input of the data has shape \(40, 8\) but \(40, 24\)"),
        (sae, x.view(2, 20, -1), r"shape \(2, 20, 24\) but \(40, 24\)"),
        (sae, [x, spoiled], "input of batch 1 has NaN or infinite values in 1 rows, the first is row 3"),
        (sae, x.long(), r"The data holds \(Tensor torch.int64\), but a floating-point tensor"),
        (sae, x.numpy(), r"Batch 0 holds \(ndarray float32\)"),
        (
            sae,
            [(x, x, x)],
            r"Batch 0 holds \(Tensor torch.float32, Tensor torch.float32, Tensor torch.float32\)",
        ),
        (sae, 3, "Data of type int cannot be evaluated on"),
    ):
        with pytest.raises(InterpError, match=message):
            evaluate(dictionary, batches)


def test_ratios_without_a_denominator_are_nan() -> None:
    sae = made("relu")
    for rows in (data(40)[:1], data(40)[:1].expand(700, -1)):
        result = evaluate(sae, rows)
        assert math.isnan(result.explained_variance) and math.isfinite(result.normalised_mse)
    zeros = evaluate(sae, torch.zeros(5, D_IN))
    assert all(math.isnan(v) for v in (zeros.explained_variance, zeros.normalised_mse, zeros.norm_ratio))
    assert math.isfinite(evaluate(sae, data(40)[:2]).explained_variance)


def test_a_perfect_dictionary_explains_everything() -> None:
    eye = Dictionary("relu", 2, 4)
    with torch.no_grad():
        eye.W_enc.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        eye.W_dec.copy_(eye.W_enc)
    result = evaluate(eye, torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + 5)
    assert result.explained_variance == 1 and result.cosine == pytest.approx(1) and result.norm_ratio == 1
    assert result.dead_share == 0.5 and result.l0 == 2

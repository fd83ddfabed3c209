"""Dictionaries on disk and their metrics."""

from __future__ import annotations

import json
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
    assert json.loads((tmp_path / "card.json").read_text())["dictionary"]["width"] == made("topk").width


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
    with pytest.raises(InterpError, match="24 wide and its target 24, but the dictionary maps 24 to 16"):
        evaluate(dictionary, x)


def test_a_perfect_dictionary_explains_everything() -> None:
    eye = Dictionary("relu", 2, 4)
    with torch.no_grad():
        eye.W_enc.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        eye.W_dec.copy_(eye.W_enc)
    result = evaluate(eye, torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + 5)
    assert result.explained_variance == 1 and result.cosine == pytest.approx(1) and result.norm_ratio == 1
    assert result.dead_share == 0.5 and result.l0 == 2

"""Dictionaries and their training: against autograd, resumed in equal bits, and refusing what cannot work."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from interp_utils.dictionaries import Dictionary, TrainConfig, steps, train
from interp_utils.dictionaries.dictionary import _check as check
from interp_utils.dictionaries.parallel import Ranks
from interp_utils.errors import InterpError
from tests import dictionary_reference as reference

D_IN, WIDTH, K, ROWS = 24, 96, 6, 64
KINDS = ("relu", "topk", "batchtopk", "jumprelu")


def data(rows: int = 1024, d: int = D_IN, seed: int = 0) -> Tensor:
    """Sparse mixtures of more directions than dimensions, scaled so that E||x||^2 = d."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d, d, generator=generator)
    on = torch.rand(rows, 2 * d, generator=generator) < 0.08
    x = (on * torch.rand(rows, 2 * d, generator=generator)) @ directions
    x -= x.mean(0)
    return x * (d / x.square().sum(1).mean()).sqrt()


def made(kind: Any, seed: int = 0, d_out: int | None = None, width: int = WIDTH) -> Dictionary:
    """A dictionary moved off its tied start, so that no gradient is trivial."""
    k = K if kind in ("topk", "batchtopk") else None
    dictionary = Dictionary.create(kind, D_IN, width, d_out, k=k, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if kind != "relu":
            dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
    return dictionary


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the norm of its row, as the design asks.

    A row whose terms cancel is a sum: it may differ by a tenth of that of the largest row.
    """
    norms = theirs.norm(dim=-1, keepdim=True) if theirs.dim() > 1 else theirs.norm()
    excess = (ours - theirs).abs() - tolerance * (norms + 0.1 * norms.max())
    assert (excess <= 0).all(), excess.max()


def one_step(
    dictionary: Dictionary, x: Tensor, y: Tensor, weight: float, sparse: bool, screen: Any = None
) -> steps.Step:
    options: dict[str, Any] = {"screen": screen, "rows": len(x), "into": {}}
    with torch.no_grad():
        if dictionary.kind == "relu":
            return steps.relu_step(dictionary, x, y, weight, sparse=sparse, **options)
        if dictionary.kind == "topk":
            return steps.topk_step(dictionary, x, y, **options)
        if dictionary.kind == "batchtopk":
            return steps.batchtopk_step(dictionary, x, y, ranks=Ranks(), **options)
        return steps.jumprelu_step(dictionary, x, y, weight, sparse=sparse, **options)


@pytest.mark.parametrize("d_out", [None, 16])
@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize(
    "kind,sparse", [(kind, False) for kind in KINDS] + [("relu", True), ("jumprelu", True)]
)
def test_loss_and_gradients_equal_autograd(kind: Any, sparse: bool, screen: Any, d_out: int | None) -> None:
    dictionary, x = made(kind, d_out=d_out), data(ROWS)
    y = x if d_out is None else data(ROWS, d_out, seed=5)
    step = one_step(dictionary, x, y, 0.7, sparse, screen)
    if kind == "relu" and screen and not sparse:
        return same_direction(dictionary, step, x, y, 0.7)
    expected, f = reference.loss(dictionary, x, y, 0.7)
    expected.backward()
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert step.l0 == pytest.approx(float((f > 0).sum(1).float().mean()))
    assert torch.equal(step.fired, (f > 0).any(0))
    for name, parameter in dictionary.named_parameters():
        close(step.gradients[name], parameter.grad)


def same_direction(dictionary: Dictionary, step: steps.Step, x: Tensor, y: Tensor, weight: float) -> None:
    """Dense bfloat16 products: as close as their 8 bits allow."""
    expected, _ = reference.loss(dictionary, x, y, weight)
    expected.backward()
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-3)
    for name, parameter in dictionary.named_parameters():
        assert (
            torch.cosine_similarity(step.gradients[name].flatten(), parameter.grad.flatten(), dim=0) > 0.999
        )


def test_the_dead_learn_from_what_is_left_over() -> None:
    for aux_k in (4, 500):
        dictionary, x, dead = made("topk"), data(ROWS), torch.arange(0, WIDTH, 3)
        with torch.no_grad():
            dictionary.b_enc[dead] -= (
                9  # silent among the k, but with a gradient through AuxK for the largest
            )
            dictionary.W_enc[dead] *= 4
        step = one_step(dictionary, x, x, 0, False)
        with torch.no_grad():
            steps.add_auxk(step, dictionary, x, dead, aux_k, len(x))
        expected, _ = reference.loss(dictionary, x, x, dead=dead, aux_k=aux_k)
        expected.backward()
        assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, parameter in dictionary.named_parameters():
            close(step.gradients[name], parameter.grad)
        close(step.radial, (dictionary.W_dec * dictionary.W_dec.grad).sum(1))


def with_silent(dictionary: Dictionary) -> Dictionary:
    """A third of the latents too weak to be chosen, though positive: dead, with a gradient through AuxK.

    Half of these start at a bias of -9 instead, from where nothing moves them.
    """
    with torch.no_grad():
        dictionary.W_enc[::3] *= 0.02
        dictionary.b_enc[::3] = 0.02
        dictionary.b_enc[::6] = -9
    return dictionary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", [False, True])
def test_fifty_steps_equal_autograd(kind: Any, freeze: bool) -> None:
    x = data(50 * ROWS)
    batches = [(part, part) for part in x.split(ROWS)]
    config = TrainConfig(
        50, ROWS, lr=1e-3, warmup_steps=5, screen=None, dead_tokens=5 * ROWS, freeze_decoder=freeze, l1=0.5
        if kind == "relu" else None,
    )  # fmt: skip
    # With seed 0 two of a row's latents come within a rounding error of each other, and either may be kept.
    ours, theirs = with_silent(made(kind, seed=1)), with_silent(made(kind, seed=1)).double()
    plain = copy.deepcopy(ours)
    log = train(ours, lambda start: iter(batches[start:]), config, progress=False)
    losses = reference.train(theirs, [(x.double(), y.double()) for x, y in batches], config)
    assert log["loss"].iloc[0] == pytest.approx(sum(losses) / 50, rel=1e-5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(own.detach(), other.detach().float())
    assert torch.equal(ours.W_dec, made(kind, seed=1).W_dec) == freeze
    if kind in ("topk", "batchtopk"):
        assert log["dead_share"].iloc[-1] > 0.1, "some are to be dead"
        train(plain, x, replace(config, aux_k=0), progress=False)
        moved, alone = (d.W_enc[3::6] - made(kind, seed=1).W_enc[3::6] * 0.02 for d in (ours, plain))
        assert moved.norm() > 1.2 * alone.norm(), "the dead learn through AuxK"


@pytest.mark.parametrize("screen", [None, "bfloat16"])
def test_l1_turns_sparse_and_stays_the_same_run(screen: Any) -> None:
    x = data(60 * ROWS)
    batches = [(part, part) for part in x.split(ROWS)]
    config = TrainConfig(60, ROWS, lr=3e-2, l1=8.0, screen=screen, log_every=5)
    ours, theirs = made("relu"), made("relu")
    log = train(ours, lambda start: iter(batches[start:]), config, progress=False)
    losses = torch.tensor(reference.train(theirs, batches, config)).view(-1, 5).mean(1)
    assert log["l0"].iloc[0] > WIDTH / 4 and log["l0"].iloc[-2] < WIDTH / 16, (
        "dense and sparse steps are wanted"
    )
    relative = (torch.tensor(log["loss"].tolist()) / losses - 1).abs().max()
    assert relative < (0.01 if screen else 1e-5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if not screen:
            close(own.detach(), other.detach(), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_in_the_same_bits(kind: Any, tmp_path: Path) -> None:
    x, file = data(600), tmp_path / "run.safetensors"
    config = TrainConfig(
        30, ROWS, lr=1e-2, log_every=8, dead_tokens=3 * ROWS, l1=3.0 if kind == "relu" else None
    )
    whole, parts = made(kind), made(kind)
    expected = train(whole, x, config, progress=False)

    def stop(step: int, *_: Any) -> None:
        if step in (3, 13, 21):
            raise KeyboardInterrupt

    options = {"checkpoint": file, "checkpoint_seconds": 0.0, "progress": False}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(parts, x, config, on_step=stop, **options)
        parts = made(kind, seed=9)  # whatever it holds, the checkpoint replaces it
    log = train(parts, x, config, **options)
    assert log.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    for own, other in zip(parts.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(own, other)
    again = made(kind, seed=4)
    assert train(again, x, config, **options).equals(log), "a finished run is not repeated"
    assert torch.equal(again.W_dec, whole.W_dec)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    x, file = data(600), tmp_path / "run.safetensors"
    config = TrainConfig(2, ROWS)
    train(made("topk"), x, config, checkpoint=file, progress=False)
    before = file.read_bytes()
    with pytest.raises(InterpError, match="another run .*width 96, not 48"):
        train(made("topk", width=48), x, config, checkpoint=file, progress=False)
    with pytest.raises(InterpError, match="another run .*steps 2, not 4"):
        train(made("topk"), x, TrainConfig(4, ROWS), checkpoint=file, progress=False)
    for other in (x[:500], x + 1e-6, (x, x)):
        with pytest.raises(
            InterpError, match="another run .data '600 x 24, hash .*' ?, not '.* x 24.*, hash"
        ):
            train(made("topk"), other, config, checkpoint=file, progress=False)
    save_file({"count": torch.zeros(())}, tmp_path / "foreign", {"identity": "{}"})
    for content in (before[: len(before) // 2], b"", (tmp_path / "foreign").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(InterpError, match="run.safetensors is missing, damaged or .*delete it"):
            train(made("topk"), x, config, checkpoint=str(file), progress=False)


def test_bad_data_is_named() -> None:
    config, x = TrainConfig(20, ROWS), data(600)

    def run(data: Any, dictionary: Dictionary | None = None, config: TrainConfig = config) -> Any:
        with pytest.raises(InterpError) as caught:
            train(dictionary or made("topk"), data, config, progress=False)
        return str(caught.value)

    spoiled = x.clone()
    spoiled[:, 3] = torch.nan
    assert "input of step 0 has NaN or infinite values in 64 rows, the first is row 0" in run(spoiled)
    assert "All rows of the input of step 0 are equal" in run(torch.ones(600, D_IN))
    assert "shape (64, 20) but (64, 24) is needed" in run(x[:, :20].clone())
    assert "fewer than one batch" in run(x[:10])
    assert "they must agree" in run((x, x[:100]))
    assert "ended after 9 of 20 steps" in run(x, config=TrainConfig(20, ROWS, epochs=1))
    assert "The target of step 0" in run((x, x[:, :8].clone()))
    transcoder = Dictionary.create("topk", D_IN, WIDTH, D_IN, k=K)
    for lone in (x, lambda start: iter([x[:ROWS]])):
        assert "Step 0 is one tensor, but a transcoder needs its input and its target" in run(
            lone, transcoder
        )
    assert "Step 0 holds (Tensor torch.int64), but a floating-point tensor" in run(
        torch.arange(600 * D_IN).view(600, -1)
    )
    for wrong in ([x], x.numpy(), (part for part in x.split(ROWS)), 3, (x, x, x)):
        assert f"type {type(wrong).__name__} cannot be trained on; give an activation store" in run(wrong)
    half = torch.full((600, D_IN), 6e4, dtype=torch.float16)  # each finite, the sum not
    half[::2] = 0
    train(made("topk"), half, TrainConfig(1, ROWS, lr=1e-9), progress=False)
    huge = torch.full((600, D_IN), 1e37)
    huge[::2] = 0
    assert "The loss of step 0 is inf" in run(huge, config=TrainConfig(1, ROWS))


def test_impossible_dictionaries_are_refused() -> None:
    with pytest.raises(InterpError, match="k is 6 but must lie between 1 and the width, 4"):
        Dictionary.create("topk", 8, 4, k=6)
    with pytest.raises(InterpError, match="needs k"):
        Dictionary.create("batchtopk", 8, 4)
    with pytest.raises(InterpError, match="has no k"):
        Dictionary.create("relu", 8, 4, k=2)
    with pytest.raises(InterpError, match="no kind of dictionary 'top'.*'topk'"):
        check("top", 8, 4, 8, None)  # behind the type checker's back
    with pytest.raises(InterpError, match="width and d_out of at least 1, not 8, 4 and 0"):
        Dictionary("relu", 8, 4, 0)
    for scale, target in ((0.0, None), (math.inf, 1.0), (1.0, -1.0), (math.nan, None)):
        with pytest.raises(InterpError, match="is no unit"):
            made("relu").set_units(torch.zeros(D_IN), scale, torch.zeros(D_IN), target)


@pytest.mark.parametrize(
    "field,wrong,right",
    [
        ("steps", (0,), 1),
        ("batch_size", (0, None), 1),
        ("lr", (0, -1e-3, math.nan, math.inf), None),
        ("warmup_steps", (-1,), 0),
        ("decay", (-0.1, 1.1, None), 1.0),
        ("l1", (-1.0,), 0.0),
        ("l1_warmup", (2.0,), None),
        ("clip_norm", (0.0,), None),
        ("aux_k", (-1,), 0),
        ("dead_tokens", (0,), 1),
        ("screen", ("float16", "bf16"), None),
        ("betas", ((0.9, 1.0), (0.9,)), (0.0, 0.99)),
        ("site", (3, ("a", "b", "c"), ("a",)), ("a", "b")),
        ("epochs", (0, -1), None),
        ("log_every", (0,), 1),
    ],
)
def test_impossible_configurations_are_refused(field: str, wrong: Any, right: Any) -> None:
    TrainConfig(**{"steps": 1, field: right})
    for value in wrong:
        config = object.__new__(TrainConfig)  # behind the type checker's back
        vars(config).update(vars(TrainConfig(1)) | {field: value})
        with pytest.raises(InterpError, match=f"^{field} is .* but must be "):
            config.__post_init__()


@pytest.mark.parametrize("kind", KINDS)
def test_folding_norms_changes_no_reconstruction(kind: Any) -> None:
    dictionary, x = made(kind), data(ROWS)
    if kind == "batchtopk":
        dictionary.set_threshold(torch.tensor(0.4))
    if kind in ("relu", "jumprelu", "batchtopk"):
        with torch.no_grad():
            dictionary.W_dec *= torch.rand(WIDTH, 1) + 0.5
    unit = dictionary.normalised()
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(WIDTH))
    close(unit(x).detach(), dictionary(x).detach())
    assert torch.equal(unit.encode(x) > 0, dictionary.encode(x) > 0)


def test_batchtopk_learns_its_threshold() -> None:
    x, dictionary = data(), made("batchtopk")
    train(dictionary, x, TrainConfig(200, ROWS, lr=1e-3), progress=False)
    l0 = float((dictionary.encode(x) > 0).sum(1).float().mean())
    assert abs(l0 - K) < 0.5


def test_create_is_seeded_and_tied() -> None:
    for kind in KINDS:
        k = K if kind in ("topk", "batchtopk") else None
        a, b = (Dictionary.create(kind, D_IN, WIDTH, k=k, seed=s) for s in (3, 3))
        assert torch.equal(a.W_enc, b.W_enc)
        assert torch.equal(a.W_enc, a.W_dec)
    relu = Dictionary.create("relu", D_IN, WIDTH)
    torch.testing.assert_close(relu.W_dec.norm(dim=1), torch.full((WIDTH,), 0.1))
    assert copy.deepcopy(relu).W_dec.equal(relu.W_dec)

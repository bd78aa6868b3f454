"""The published tokenizer against torch's own layers, and its codebook against a plain loop."""
import dataclasses

import pytest
import torch
from conftest import TRAIN, checkpoint, command, make_photos, trains
from test_ladmim import SMALL

import ladmim
from backbone import CHANNELS
from published import FFN, Codebook, Layer, PublishedHVQ

CFG = dataclasses.replace(SMALL, tokenizer="published", codebook="ema", hvq_width=16)


def same_weights(layer, reference):
    """Gives torch's layer the weights of ours."""
    for ours, name in zip(layer.attentions, ("self_attn", "multihead_attn")):
        getattr(reference, name).load_state_dict(ours.state_dict())
    for i, norm in enumerate(layer.norms):
        getattr(reference, f"norm{i + 1}").load_state_dict(norm.state_dict())
    reference.linear1.load_state_dict(layer.ffn[0].state_dict())
    reference.linear2.load_state_dict(layer.ffn[3].state_dict())
    return reference


@pytest.mark.parametrize("attentions, reference", [(1, torch.nn.TransformerEncoderLayer),
                                                   (2, torch.nn.TransformerDecoderLayer)])
def test_a_layer_without_positions_is_torchs(attentions, reference):
    torch.manual_seed(0)
    layer = Layer(16, 4, 0.0, attentions)
    theirs = same_weights(layer, reference(16, 4, FFN, 0.0, batch_first=True))
    x, z = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    seen = (x,) if attentions == 1 else (x, z)
    torch.testing.assert_close(layer(x, torch.zeros(9, 16), z), theirs(*seen), atol=1e-5, rtol=1e-5)


def test_bfloat16_multiplies_in_fewer_bits_and_attends_in_all():
    torch.manual_seed(0)
    layer, positions = Layer(16, 4, 0.0, 2), torch.randn(9, 16)
    x, z = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    seen = []
    layer.attentions[0].register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x.bfloat16(), positions, z.bfloat16())
    torch.testing.assert_close(rough.float(), layer(x, positions, z), atol=0.1, rtol=0)
    assert seen[0] == torch.float32                                  # see `ladmim.Attention`


def test_positions_reach_queries_and_keys_but_not_values():
    """Of one token only its value is left, and that has no position."""
    layer, x = Layer(16, 4, 0.0, 1), torch.randn(2, 1, 16)
    torch.testing.assert_close(layer(x, torch.zeros(1, 16)), layer(x, torch.randn(1, 16)))
    many = torch.randn(2, 9, 16)
    assert not torch.allclose(layer(many, torch.zeros(9, 16)), layer(many, torch.randn(9, 16)))


@pytest.mark.parametrize("photos", [1, 3])
def test_codes_follow_the_running_mean(photos):
    torch.manual_seed(0)
    book = Codebook(5, 4, 0.99)
    start, x = book.codes.clone(), torch.randn(photos, 20, 4)
    z, index = book(x)
    nearest = torch.cdist(x.double(), start.double()).argmin(-1)
    torch.testing.assert_close(index, nearest)
    torch.testing.assert_close(z, start[nearest])
    used = book.follow(x, index)
    keep = 0.99 ** photos
    count = torch.stack([(nearest == k).sum() for k in range(5)]).float() / photos
    total = torch.stack([x[nearest == k].sum(0) for k in range(5)]) / photos
    torch.testing.assert_close(used, count * photos)
    count, total = (1 - keep) * count, keep * start + (1 - keep) * total
    smooth = (count + 1e-5) / (count.sum() + 5e-5) * count.sum()
    torch.testing.assert_close(book.codes, total / smooth[:, None])


def test_levels_see_h0_to_h3_beside_the_condition():
    torch.manual_seed(0)
    hvq, h0 = PublishedHVQ(CFG, CHANNELS).eval(), torch.randn(2, 36, CHANNELS)
    x, z, codes = hvq.quantise(h0)
    assert [seen.shape[-1] for seen in x] == [32, 32, 32, 32, 16]
    torch.testing.assert_close(x[0][..., :16], hvq.embed(h0))        # the local level
    for level in range(4):
        torch.testing.assert_close(x[level][..., 16:], z[4])
        torch.testing.assert_close(z[level], hvq.books[level].codes[codes[level]])
    rebuilt, found = hvq(h0)
    assert rebuilt.shape == h0.shape and found.shape == (2, 4, 36)
    torch.testing.assert_close(found, torch.stack(codes[:4], 1))
    positions = hvq.positions().view(6, 6, 16)                       # row, column
    assert (positions[:, 2, :8] == hvq.columns[2]).all()
    assert (positions[3, :, 8:] == hvq.rows[3]).all()


def test_loss_is_feature_error_and_commitment():
    torch.manual_seed(0)
    hvq, h0 = PublishedHVQ(CFG, CHANNELS), torch.randn(2, 36, CHANNELS)
    x, z, codes = hvq.quantise(h0)
    expected = (hvq.decode(z[:-1]) - h0).square().mean()
    for seen, nearest in zip(x, z):
        expected = expected + 0.25 * (seen - nearest).square().mean()
    loss = hvq.loss(h0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is not None for weight in hvq.parameters() if weight.requires_grad)
    assert hvq.used.sum(1).tolist() == [72.0] * 5


def test_the_authors_preset_has_their_shapes():
    cfg = ladmim.Config(**ladmim.PRESETS["authors"])
    hvq = ladmim.TOKENIZERS[cfg.tokenizer](cfg, CHANNELS)
    assert [tuple(book.codes.shape) for book in hvq.books] == [(512, 128)] * 4 + [(512, 64)]
    assert hvq.positions().shape == (576, 64) and hvq.out.weight.shape == (384, 128)
    mim = ladmim.ViT(cfg, CHANNELS)
    assert all((block.scale == 1e-4).all() for block in mim.blocks)


def one_categorys(hvq, number):
    """A PublishedHVQ of one category with what hvq, of several, has for category `number`."""
    single, state, size = PublishedHVQ(CFG, CHANNELS), hvq.state_dict(), CFG.codes
    for name in state:
        if name.startswith("books."):
            state[name] = state[name].unflatten(0, (-1, size))[number]
        elif name.startswith("out."):
            state[name] = state[name].unflatten(0, (-1, CHANNELS))[number]
    state["used"] = state["used"].unflatten(1, (-1, size))[:, number]
    single.load_state_dict(state)
    return single


def test_categories_with_codes_of_their_own_are_models_of_one_category():
    """Each category's codes follow its own photos; those of absent ones stay."""
    torch.manual_seed(0)
    hvq, own = PublishedHVQ(CFG, CHANNELS, 3).train(False), torch.tensor([2, 0, 2, 2])
    h0 = torch.randn(4, 36, CHANNELS)
    singles, absent = [one_categorys(hvq, number) for number in range(3)], one_categorys(hvq, 1)
    rebuilt, codes = hvq(h0, own)
    for number in (0, 2):
        expected = singles[number].eval()(h0[own == number])
        torch.testing.assert_close((rebuilt[own == number], codes[own == number]), expected)
    losses = [singles[number].loss(h0[own == number]).item() for number in (0, 2)]
    together = hvq.loss(h0, own).item()
    assert together == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-5)
    for number in (0, 2):
        for name, expected in singles[number].state_dict().items():
            torch.testing.assert_close(one_categorys(hvq, number).state_dict()[name], expected)
    for name, expected in absent.state_dict().items():
        torch.testing.assert_close(one_categorys(hvq, 1).state_dict()[name], expected)


@pytest.mark.parametrize("categories", [1, 2])
def test_codes_that_are_all_the_same_are_named(tmp_path, categories):
    """The ViT's histograms then say nothing, and its loss would look like perfect learning."""
    for name in ("bolts", "nuts")[:categories]:
        make_photos(tmp_path / "photos", name)
    usual = [*TRAIN[:3], "--category", "all", *TRAIN[5:], "--hvq-epochs", "5", "--out"]
    assert "one code" not in command(*usual, "usual", cwd=tmp_path).stderr
    at = usual.index("--code-dim")
    usual[at:at + 2] = ["--tokenizer", "published"]
    assert "gives all photos one code" in command(*usual, "published", cwd=tmp_path).stderr
    usual += ["features", "--target", "feature", "--mim-score", "deviations"]    # needs no codes
    assert "one code" not in command(*usual, cwd=tmp_path).stderr


def test_the_clipped_mean_moves_the_vit_as_the_published_sum(tmp_path, monkeypatch):
    """Their loss is the sum over a batch of 32, clipped at 1, in an AdamW whose eps is 1e-8."""
    make_photos(tmp_path / "photos", train=32)
    usual = "--hvq-epochs 1 --mim-epochs 3 --mim-batch 32 --mim-layer-scale 1e-4".split()
    trains(*usual, "--mim-clip", str(1 / 32), "--out", "mean", cwd=tmp_path)
    real = ladmim.descend

    def descend(optimizer, loss, mine, batch, clip):
        if clip == 1:                                # the ViT's, not HVQ-Trans's
            loss = loss * len(batch)
        return real(optimizer, loss, mine, batch, clip)

    monkeypatch.setattr(ladmim, "descend", descend)
    trains(*usual, "--mim-clip", "1", "--out", "sum", cwd=tmp_path)
    ours, theirs = (checkpoint(tmp_path / name)["mim"] for name in ("mean", "sum"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)
